"""Make a container's network on the target: everything but the last step, which is one prepared message.

The interface is up in the container's namespace, with its addresses, routes and neighbours, but its host end is no
port of the bridge until `BuiltNetwork.attach`: so two hosts may hold the same address, and one is silent.
Source: veth(4), rtnetlink(7), ip-netns(8).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import threading
import time
from ipaddress import ip_address
from typing import TYPE_CHECKING

from agent.network import capture, links, routes, sysctls
from agent.network.frames import announcements, mac_bytes, mac_text
from agent.network.namespaces import (
    create_named_namespace,
    inside,
    is_named_namespace,
    namespace_of,
    remove_named_namespace,
)
from agent.network.netlink import Batch, Netlink
from protocol.errors import KernelError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from agent.network.links import Link
    from protocol.messages import Interface, Neighbour, Network

# A switch or a host that missed the first announcement hears the next; the last one is for slow ports.
ANNOUNCE_AFTER_S = (0.05, 0.2, 1.0)
_READY_TIMEOUT_S = 5.0  # Carrier and addresses are ready within milliseconds; a busy kernel worker may take longer.
_READY_POLL_S = 0.002
_DEVICE_NAME = re.compile(r"[^/\s:]{1,15}")
_MAX_DEVICE_NAME = 15


class BuiltNetwork:
    """A container's network that is complete and not yet attached. `close` when it is no longer needed."""

    def __init__(
        self,
        *,
        network: Network,
        host_names: list[str],
        netlink: Netlink,
        attach: Batch,
        injectors: dict[str, socket.socket],
        announcers: list[tuple[socket.socket, list[bytes]]],
        inner: Netlink,
        own: Mapping[str, str],
    ) -> None:
        self.network = network
        self.host_names = host_names
        self._netlink = netlink
        self._attach = attach
        self._injectors = injectors
        self._announcers = announcers
        self._inner = inner
        self._own = own
        self._stop_announcing = threading.Event()
        self._thread: threading.Thread | None = None

    def attach(self) -> None:
        """Make the host ends ports of the bridge. For the freeze: one send of bytes that exist.

        Raises: KernelError: the host end or the bridge is gone.
        """
        if self._attach.calls:
            self._netlink.run(self._attach)

    def announce(self, *, repeat: bool = True) -> None:
        """Tell the segment by gratuitous ARP and unsolicited advertisements where the addresses are now.

        With `repeat` a thread says it again after each of ANNOUNCE_AFTER_S.
        """
        self._send_announcements()
        if repeat and self._announcers and self._thread is None:
            self._thread = threading.Thread(target=self._announce_again, name="announce", daemon=True)
            self._thread.start()

    def inject_socket(self, interface: str = "") -> socket.socket:
        """Where a captured frame is sent to arrive in the container, through `interface` (default: the first).

        The socket belongs to this object; duplicate it, or pass it by SCM_RIGHTS.
        Raises: KeyError: no such interface.
        """
        return self._injectors[interface or next(iter(self._injectors))]

    def set_neighbours(self, neighbours: Iterable[Neighbour]) -> None:
        """Put a newer neighbour table beside what is there.

        Raises: KernelError, ValueError.
        """
        indexes = {link.name: link.index for link in links.read_links(self._inner)}
        requests = _neighbour_requests(neighbours, indexes, self._own)
        if requests:
            self._inner.run(Batch(requests))

    def close(self) -> None:
        """Stop announcing and close the sockets. The network stays."""
        self._stop_announcing.set()
        if self._thread is not None:
            self._thread.join()
        for open_socket in (*self._injectors.values(), *(pair[0] for pair in self._announcers)):
            open_socket.close()
        self._netlink.close()
        self._inner.close()

    def _send_announcements(self) -> None:
        for announcer, frames in self._announcers:
            for frame in frames:
                # A full device loses an announcement as any frame; the repetition is for that.
                with contextlib.suppress(BlockingIOError):
                    announcer.send(frame)

    def _announce_again(self) -> None:
        start_s = time.monotonic()
        for after_s in ANNOUNCE_AFTER_S:
            if self._stop_announcing.wait(max(0.0, start_s + after_s - time.monotonic())):
                return
            try:
                self._send_announcements()
            except OSError:
                return  # The container and its interface are gone: nobody is left to announce.


def host_names_for(network: Network, host_name: str) -> list[str]:
    """The host ends' names on the target: `host_name` for the first interface, then with a number."""
    return [
        host_name if number == 0 else f"{host_name[: _MAX_DEVICE_NAME - 2]}.{number}"
        for number in range(len(network.interfaces))
    ]


def create_network(
    network: Network, *, namespace_path: str | None, pid: int | None, bridge: str, host_name: str
) -> BuiltNetwork:
    """Make `network` in a named namespace (made here when it is not there) or in that of process `pid`.

    `host_name`: of the first interface's host end. What was made before an error is removed again.
    Raises: UnsupportedError: a name is not permitted, or the namespace is in use. KernelError.
        ValueError: not an address.
    """
    names = host_names_for(network, host_name)
    _check_names(network, names)
    if (namespace_path is None) == (pid is None):
        message = "one of namespace_path and pid is needed"
        raise ValueError(message)
    made_namespace = False
    if namespace_path is not None and not is_named_namespace(namespace_path):
        create_named_namespace(namespace_path)
        made_namespace = True
    namespace = namespace_path if namespace_path is not None else namespace_of(pid or 0)
    try:
        with contextlib.ExitStack() as on_error:
            built = _build(network, namespace, bridge, names, on_error)
            on_error.pop_all()
            return built
    except BaseException:
        if made_namespace and namespace_path is not None:
            remove_named_namespace(namespace_path)
        raise


def attach_by_name(host_name: str, bridge: str) -> None:
    """Make a host end a port of the bridge, from names alone, as `BuiltNetwork.attach` does. It may be one already.

    For a journal, after a crash, when the container is owned here. Raises: KernelError: one of them is gone.
    """
    with Netlink() as netlink:
        end = links.need_link(netlink, host_name, "the host end of the container")
        port_of = links.need_link(netlink, bridge, "the bridge for containers")
        netlink.run(Batch([_attach_request(end, port_of.index, bridge)]))


def remove_network(namespace_path: str, *host_names: str) -> None:
    """Undo `create_network` from its names alone; '' as path leaves the namespace. What is gone already is success.

    Raises: UnsupportedError: not a permitted path. KernelError.
    """
    with Netlink() as netlink:
        for name in host_names:
            links.delete_link(netlink, name)
    if namespace_path:
        remove_named_namespace(namespace_path)


def _check_names(network: Network, host_names: list[str]) -> None:
    for name in (*host_names, *(interface.name for interface in network.interfaces)):
        if not _DEVICE_NAME.fullmatch(name) or name in {".", ".."}:
            raise UnsupportedError(f"{name!r} is not a name of a network device", code="interface-name")


def _build(
    network: Network, namespace: str, bridge: str, host_names: list[str], on_error: contextlib.ExitStack
) -> BuiltNetwork:
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        host = Netlink()
        on_error.callback(host.close)
        port_of, bridge_mtu = 0, 0
        if network.interfaces:
            bridge_link = links.need_link(host, bridge, "the bridge of the container")
            port_of, bridge_mtu = bridge_link.index, bridge_link.mtu
        with inside(descriptor):
            inner = Netlink()
            on_error.callback(inner.close)
            _check_empty(inner, namespace)
            sysctls.write_namespace(network.sysctls)
        for interface, host_name in zip(network.interfaces, host_names, strict=True):
            _make_pair(host, interface, host_name, descriptor, bridge_mtu)
            on_error.callback(links.delete_link, host, host_name)
        ends = [links.need_link(host, name, "a host end") for name in host_names]
        own = _addresses_of(host, port_of)
        with inside(descriptor):
            _configure(inner, network, own)
            announcers = [_announcer(interface) for interface in network.interfaces]
        for announcer, _ in announcers:
            on_error.callback(announcer.close)
    finally:
        os.close(descriptor)
    _wait_ready(host, host_names)
    injectors = {}
    for interface, name in zip(network.interfaces, host_names, strict=True):
        injectors[interface.name] = capture.open_injector(name)
        on_error.callback(injectors[interface.name].close)
    return BuiltNetwork(
        network=network,
        host_names=host_names,
        netlink=host,
        attach=Batch([_attach_request(end, port_of, bridge) for end in ends]),
        injectors=injectors,
        announcers=announcers,
        inner=inner,
        own=own,
    )


def _attach_request(end: Link, bridge_index: int, bridge: str) -> tuple[str, bytes]:
    data = links.change_link_message(end.index, master=bridge_index, clear_flags=links.IFF_NOARP)
    return f"attach {end.name} to bridge {bridge}", data


def _check_empty(inner: Netlink, namespace: str) -> None:
    taken = [link.name for link in links.read_links(inner) if not link.is_loopback and link.is_up]
    taken += [link.name for link in links.read_links(inner) if link.kind == "veth" and link.name not in taken]
    if taken:
        raise UnsupportedError(
            f"network namespace {namespace} is in use: it has {', '.join(taken)}",
            code="network-namespace-in-use",
            hint="remove it with `ip netns del`, or stop what uses it",
        )


def _make_pair(host: Netlink, interface: Interface, host_name: str, namespace: int, bridge_mtu: int) -> None:
    """Host end up, without a life of its own: no ARP (see `change_link_message`), no IPv6 address."""
    # A bridge takes the lowest address of its ports: ours must never be the lowest.
    host_mac = b"\xfe" + secrets.token_bytes(5)
    links.create_veth(
        host,
        name=host_name,
        mac=host_mac,
        peer_name=interface.name,
        peer_mac=mac_bytes(interface.mac),
        peer_namespace=namespace,
        # A bridge takes the smallest MTU of its ports, too: the container's own holds at its own end.
        mtu=max(interface.mtu, bridge_mtu),
        peer_mtu=interface.mtu,
    )
    end = links.need_link(host, host_name, "a host end")
    links.stop_link_local(host, end)
    links.change_flags(host, end, set_flags=links.IFF_UP | links.IFF_NOARP)


def _addresses_of(host: Netlink, bridge_index: int) -> dict[str, str]:
    """The bridge's own addresses and its MAC: a gateway that every host has under one address is another one here."""
    macs = {link.index: mac_text(link.mac) for link in links.read_links(host) if link.index == bridge_index}
    return {str(ip_address(one.address)): macs[one.index] for one in links.read_addresses(host) if one.index in macs}


def _configure(inner: Netlink, network: Network, own: Mapping[str, str]) -> None:
    """Inside the namespace: the order matters, an address needs its device up, a route its gateway's address.

    `own`: MAC by address of what the target's bridge itself answers for.
    """
    links.change_flags(inner, links.need_link(inner, "lo", "the loopback device"), set_flags=links.IFF_UP)
    found = {link.name: link for link in links.read_links(inner)}
    indexes = {name: link.index for name, link in found.items()}
    for interface in network.interfaces:
        link = found[interface.name]
        settings = dict(interface.sysctls)
        generation = settings.pop(_ADDR_GEN_MODE, None)
        sysctls.write_device(interface.name, settings)
        links.stop_link_local(inner, link)
        if interface.up:
            links.change_flags(inner, link, set_flags=links.IFF_UP)
        for one in interface.addresses:
            links.add_address(inner, index=link.index, address=one.address, prefix=one.prefix, scope=one.scope)
        _restore_generation(interface, generation)
    _wait_ready(inner, [interface.name for interface in network.interfaces if interface.up])
    for route in sorted(network.routes, key=lambda one: bool(one.gateway)):
        routes.add_route(inner, route, indexes)
    requests = _neighbour_requests(network.neighbours, indexes, own)
    if requests:
        inner.run(Batch(requests))


_ADDR_GEN_MODE = "ipv6/conf/addr_gen_mode"


def _restore_generation(interface: Interface, carried: str | None) -> None:
    """Give back how link-local addresses are made. It makes one at once if there is none: so only if there was."""
    has_link_local = any(ip_address(one.address).is_link_local for one in interface.addresses if ":" in one.address)
    if has_link_local or not interface.up:
        sysctls.write_device(interface.name, {_ADDR_GEN_MODE: carried or "0"})


def _neighbour_requests(
    neighbours: Iterable[Neighbour], indexes: Mapping[str, int], own: Mapping[str, str]
) -> list[tuple[str, bytes]]:
    return [
        (
            f"add neighbour {one.address}",
            links.neighbour_message(
                index=indexes[one.interface],
                address=ip_address(one.address).packed,
                mac=mac_bytes(own.get(one.address, one.mac)),
                permanent=one.permanent,
            ),
        )
        for one in neighbours
    ]


def _announcer(interface: Interface) -> tuple[socket.socket, list[bytes]]:
    """A socket inside the namespace, so that the bridge learns the container's port from the announcement."""
    announcer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    announcer.bind((interface.name, 0))
    addresses = [ip_address(one.address).packed for one in interface.addresses]
    return announcer, announcements(mac_bytes(interface.mac), addresses)


def _wait_ready(netlink: Netlink, names: Iterable[str]) -> None:
    """Wait until devices have carrier and no address is tentative. The kernel's workers do that; nothing else can ask.

    Raises: KernelError: ETIMEDOUT, naming the devices.
    """
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    waiting = set(names)
    while True:
        found = {link.name: link for link in links.read_links(netlink)}
        tentative = {one.index for one in links.read_addresses(netlink) if one.flags & links.IFA_F_TENTATIVE}
        waiting = {
            name for name in waiting if not found[name].operational or found[name].index in tentative
        }  # fmt: skip
        if not waiting:
            return
        if time.monotonic() > deadline_s:
            what = ", ".join(sorted(waiting))
            raise KernelError(f"wait for {what}", 110, f"no carrier after {_READY_TIMEOUT_S:g} s")
        time.sleep(_READY_POLL_S)
