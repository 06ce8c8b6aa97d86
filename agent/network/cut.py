"""Cut a container off its bridge in the freeze, and catch what is sent to it meanwhile.

Before the freeze a *catcher* is put on the bridge: a veth port whose other end lies in an anonymous network namespace,
with a capture socket on it. The sockets hold that namespace: when the last process that has one is gone, the
catcher vanishes by itself. In the freeze one send tells the bridge to forward the container's MAC to the catcher and
takes the container's port out. The order loses no frame and doubles none: unicast goes to the one or to the other.

The forwarding entry is an ordinary learned one: when the target announces the container, this bridge follows at once.
Source: bridge(8), rtnetlink(7), net/bridge/br_fdb.c (a user's entry moves when the address is learned elsewhere).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from ipaddress import ip_address
from typing import TYPE_CHECKING

from agent.network import capture, links
from agent.network.frames import is_for_container, mac_bytes
from agent.network.namespaces import inside, open_fresh_namespace
from agent.network.netlink import Batch, Netlink
from protocol.errors import KernelError

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from agent.network.links import Link
    from protocol.messages import Interface

_INNER_NAME = "catch"


class Cut:
    """One interface that can be cut off and put back. `close` removes the catcher."""

    def __init__(
        self,
        *,
        interface: Interface,
        catcher: str,
        netlink: Netlink,
        cut: Batch,
        uncut: Batch,
        capture_socket: socket.socket,
        injector: socket.socket,
    ) -> None:
        self.interface = interface
        self.catcher = catcher
        self.is_cut = False
        self.macs = frozenset({mac_bytes(interface.mac)})
        self.addresses = frozenset(ip_address(one.address).packed for one in interface.addresses)
        self._netlink = netlink
        self._cut = cut
        self._uncut = uncut
        self._capture = capture_socket
        self._injector = injector

    def cut(self) -> None:
        """Take the container off the bridge. For the freeze: one send of bytes that exist.

        What the capture socket held before (questions to all) is thrown away: the container got it too.
        Raises: KernelError: the host end or the bridge is gone; call `uncut`.
        """
        capture.discard(self._capture)
        self.is_cut = True
        self._netlink.run(self._cut)

    def uncut(self, caught: Iterable[bytes] = ()) -> int:
        """Put the container back and deliver what was caught; the number of frames delivered.

        `caught`: frames that somebody has read from the capture socket already; they are delivered first.
        Raises: KernelError: the host end or the bridge is gone.
        """
        delivered = sum(self._deliver(frame) for frame in caught)
        # Before the port is back: newer frames must not overtake older ones.
        delivered += sum(self._deliver(frame) for frame in capture.drain(self._capture))
        self._netlink.run(self._uncut)
        self.is_cut = False
        return delivered + sum(self._deliver(frame) for frame in capture.drain(self._capture))

    def capture_socket(self) -> socket.socket:
        """Where the caught frames are read. It belongs to this object; duplicate it, or pass it by SCM_RIGHTS."""
        return self._capture

    def is_wanted(self, frame: bytes) -> bool:
        return is_for_container(frame, self.macs, self.addresses)

    def statistics(self) -> tuple[int, int]:
        """Frames (caught, dropped for want of buffer) since the last call."""
        return capture.statistics(self._capture)

    def close(self) -> None:
        """Remove the catcher. The container's port stays as it is, cut or not."""
        try:
            links.delete_link(self._netlink, self.catcher)
        finally:
            self._capture.close()
            self._injector.close()
            self._netlink.close()

    def _deliver(self, frame: bytes) -> bool:
        return self.is_wanted(frame) and capture.inject(self._injector, frame)


def catcher_name(interface: Interface) -> str:
    """The name of the catcher's port, known before it is made, for a journal."""
    return f"mc{mac_bytes(interface.mac).hex()}"


def prepare_cut(interface: Interface, *, bridge: str = "") -> Cut:
    """Put a catcher on the bridge, before the freeze; the container goes on as it was.

    `bridge`: default is that of the interface. A catcher that was left over is replaced.
    Raises: KernelError: the host end is not there or not a port of the bridge.
    """
    bridge = bridge or interface.bridge
    name = catcher_name(interface)
    with contextlib.ExitStack() as on_error:
        netlink = Netlink()
        on_error.callback(netlink.close)
        bridge_link = links.need_link(netlink, bridge, "the bridge of the container")
        end = links.need_link(netlink, interface.host_name, "the host end of the container")
        if end.master != bridge_link.index:
            raise KernelError(f"prepare cut of {end.name}", 22, f"it is no port of bridge {bridge}")
        # A bridge without an address of its own takes that of a port, and another one when that port goes: pin it.
        links.set_mac(netlink, bridge_link, bridge_link.mac)
        links.delete_link(netlink, name)
        on_error.callback(links.delete_link, netlink, name)
        capture_socket = _make_catcher(netlink, interface, name, bridge_link, end.mtu)
        on_error.callback(capture_socket.close)
        port = links.need_link(netlink, name, "the catcher")
        injector = capture.open_injector(end.name)
        on_error.callback(injector.close)
        prepared = Cut(
            interface=interface,
            catcher=name,
            netlink=netlink,
            cut=_cut_batch(interface, end, port),
            uncut=_uncut_batch(interface, end, bridge_link),
            capture_socket=capture_socket,
            injector=injector,
        )
        on_error.pop_all()
        return prepared


def undo_cut(*, host_name: str, bridge: str, catcher: str) -> None:
    """Put a container back on its bridge and remove the catcher, from names alone; what is done already is success.

    For a journal, after a crash, when the container is still owned here. Whatever was caught is lost.
    Raises: KernelError: the bridge is gone.
    """
    with Netlink() as netlink:
        end = links.find_link(netlink, host_name)
        if end is not None:
            bridge_link = links.need_link(netlink, bridge, "the bridge of the container")
            data = links.change_link_message(end.index, master=bridge_link.index, clear_flags=links.IFF_NOARP)
            if end.master != bridge_link.index or end.flags & links.IFF_NOARP:
                netlink.run(Batch([(f"attach {host_name} to bridge {bridge}", data)]))
        links.delete_link(netlink, catcher)


def remove_catcher(catcher: str) -> None:
    """Remove a catcher by name and leave the container's port as it is. That there is none is success."""
    with Netlink() as netlink:
        links.delete_link(netlink, catcher)


def _make_catcher(netlink: Netlink, interface: Interface, name: str, bridge: Link, mtu: int) -> socket.socket:
    """`mtu`: that of the port it stands in for; a smaller one would make the whole bridge smaller."""
    namespace = open_fresh_namespace()
    try:
        links.create_veth(
            netlink,
            name=name,
            mac=b"\xfe" + secrets.token_bytes(5),
            peer_name=_INNER_NAME,
            peer_mac=b"\xfe" + secrets.token_bytes(5),
            peer_namespace=namespace,
            mtu=mtu,
            peer_mtu=mtu,
        )
        port = links.need_link(netlink, name, "the catcher")
        links.stop_link_local(netlink, port)
        links.set_master(netlink, port, bridge.index)
        links.set_catcher_port(netlink, port)
        with inside(namespace), Netlink() as inner:
            end = links.need_link(inner, _INNER_NAME, "the catcher")
            links.stop_link_local(inner, end)
            # Up first: a packet socket that is bound to a device that is down reports ENETDOWN.
            links.change_flags(inner, end, set_flags=links.IFF_UP | links.IFF_NOARP)
            addresses = [ip_address(one.address).packed for one in interface.addresses]
            capture_socket = capture.open_capture(_INNER_NAME, mac_bytes(interface.mac), addresses)
        links.change_flags(netlink, port, set_flags=links.IFF_UP | links.IFF_NOARP)
    finally:
        os.close(namespace)
    return capture_socket


def _cut_batch(interface: Interface, end: Link, port: Link) -> Batch:
    mac = mac_bytes(interface.mac)
    # Detached, the host end must not answer ARP with its own MAC when the container's kernel asks for somebody.
    detach = links.change_link_message(end.index, master=0, set_flags=links.IFF_NOARP)
    return Batch(
        [
            (f"forward {interface.mac} to {port.name}", links.forwarding_message(mac, port.index)),
            (f"detach {end.name}", detach),
            # Again: a last frame of the container in between would have moved it back to the port that went.
            (f"forward {interface.mac} to {port.name}", links.forwarding_message(mac, port.index)),
        ]
    )


def _uncut_batch(interface: Interface, end: Link, bridge: Link) -> Batch:
    attach = links.change_link_message(end.index, master=bridge.index, clear_flags=links.IFF_NOARP)
    return Batch(
        [
            (f"attach {end.name} to bridge {bridge.name}", attach),
            (f"forward {interface.mac} to {end.name}", links.forwarding_message(mac_bytes(interface.mac), end.index)),
        ]
    )
