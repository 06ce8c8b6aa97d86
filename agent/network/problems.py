"""Why a container's network cannot move: all causes at once, each naming the thing.

Source: rtnetlink(7); linux/netfilter/nf_tables.h; linux/netfilter_ipv4/ip_tables.h.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from agent.network import links
from agent.network.namespaces import check_name
from agent.network.netlink import NETLINK_NETFILTER, Netlink, as_int, as_text, attributes
from protocol.errors import KernelError, UnsupportedError
from protocol.messages import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.network.links import Address, Link
    from protocol.messages import Interface, Network

# The kernel puts these into every new namespace when their module is loaded; down, they do nothing.
_FALLBACK_DEVICES = frozenset({
    "tunl0", "gre0", "gretap0", "erspan0", "sit0", "ip6tnl0", "ip6gre0", "ip_vti0", "ip6_vti0",
})  # fmt: skip
_DEFAULT_RULES = frozenset({0, 32766, 32767})  # priorities of local, main and default
_TCA_KIND = 1
_FRA_PRIORITY = 6
# linux/netfilter/nfnetlink.h, nf_tables.h
_NFT_MSG_GETTABLE = 10 << 8 | 1
_NFTA_TABLE_NAME = 1
_NF_FAMILIES = {0: "", 1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
# linux/netfilter_ipv4/ip_tables.h, netfilter_ipv6/ip6_tables.h: XT_BASE_CTL
_SO_GET_INFO = 64
_XT_INFO = struct.Struct("=32sI5I5III")
_libc = ctypes.CDLL(None, use_errno=True)
_MAX_INTERFACES = 8  # Each has a catcher, a port and sockets of its own; more than a few is a router, not a service.


def record_problems(network: Network, host_bridge: str = "", host_links: Iterable[Link] = ()) -> list[Refusal]:
    """What the record shows, with the host's devices, where they are given, for the state of the bridge."""
    if network.kind == "host":
        return [
            Refusal(
                code="host-network",
                message="the container uses the host's network: its address and ports belong to the host",
                hint="run it with a network namespace of its own",
            )
        ]
    found = _path_problems(network)
    bridges = {link.name: link for link in host_links if link.kind == "bridge"}
    for interface in network.interfaces:
        found += _interface_problems(interface, host_bridge, bridges.get(interface.bridge))
    used = sorted({interface.bridge for interface in network.interfaces if interface.bridge})
    if len(used) > 1 and not host_bridge:
        found.append(
            Refusal(
                code="several-bridges",
                message=f"the interfaces are on several bridges: {', '.join(used)}; the target has one",
                object=", ".join(used),
            )
        )
    if len(network.interfaces) > _MAX_INTERFACES:
        message = f"{len(network.interfaces)} interfaces; at most {_MAX_INTERFACES} can be moved"
        found.append(Refusal(code="too-many-interfaces", message=message))
    return found


def _path_problems(network: Network) -> list[Refusal]:
    if not network.path:
        return []
    try:
        check_name(network.path)
    except UnsupportedError as error:
        return [Refusal(code=error.code, message=error.message, hint=error.hint, object=network.path)]
    return []


def _interface_problems(interface: Interface, host_bridge: str, bridge: Link | None) -> list[Refusal]:
    name = interface.name
    if not interface.host_name:
        message = f"{name}: its other end is not on this host's network, but in some other namespace"
        return [Refusal(code="veth-elsewhere", message=message, object=name)]
    if not interface.bridge:
        return [
            Refusal(
                code="no-bridge",
                message=f"{name}: its host end {interface.host_name} is on no bridge: the address is routed or NATed",
                hint="use --network none, or attach it to a bridge that both hosts share",
                object=interface.host_name,
            )
        ]
    found = []
    if host_bridge and interface.bridge != host_bridge:
        found.append(
            Refusal(
                code="other-bridge",
                message=f"{name}: its host end is on bridge {interface.bridge}, the agent's settings say {host_bridge}",
                hint="set `bridge` below [network] in agent.toml",
                object=interface.bridge,
            )
        )
    if bridge is not None and bridge.vlan_filtering:
        message = f"bridge {bridge.name} filters VLANs: what is for a VLAN cannot be caught"
        found.append(Refusal(code="vlan-bridge", message=message, object=bridge.name))
    if bridge is not None and bridge.stp:
        found.append(
            Refusal(
                code="stp-bridge",
                message=f"bridge {bridge.name} runs the spanning tree protocol: a new port would be mute for seconds",
                hint=f"ip link set {bridge.name} type bridge stp_state 0",
                object=bridge.name,
            )
        )
    return found


def namespace_problems(
    netlink: Netlink, found: list[Link], addresses: list[Address], routes_beyond: list[tuple[str, str]]
) -> list[Refusal]:
    """What only the namespace itself shows. The calling thread must be inside it, as `netlink` is."""
    names = {link.index: link.name for link in found}
    refusals = []
    for link in found:
        refusals += _device_problems(link)
    for one in addresses:
        refusals += _address_problems(one, names.get(one.index, "?"))
    for destination, why in routes_beyond:
        message = f"the route to {destination} has {why}: that is not carried yet"
        refusals.append(Refusal(code="route", message=message, object=destination))
    refusals += _rule_problems(netlink)
    refusals += _qdisc_problems(netlink, names)
    return refusals + _nftables_problems() + _iptables_problems()


def _device_problems(link: Link) -> list[Refusal]:
    if link.is_loopback or (link.name in _FALLBACK_DEVICES and not link.is_up):
        return []
    kind = link.kind or "physical"
    if kind != "veth":
        message = f"interface {link.name} is of kind {kind}; only veth can be moved"
        return [Refusal(code="interface-kind", message=message, object=link.name)]
    found = []
    if link.has_xdp:
        found.append(Refusal(code="xdp", message=f"interface {link.name} has an XDP program", object=link.name))
    if link.master:
        message = f"interface {link.name} is part of another device of the container (bridge, bond, VRF)"
        found.append(Refusal(code="interface-master", message=message, object=link.name))
    return found


def _address_problems(one: Address, name: str) -> list[Refusal]:
    if one.peer != one.address:
        message = f"interface {name} has a point-to-point address"
        return [Refusal(code="peer-address", message=message, object=name)]
    if one.flags & links.IFA_F_NOPREFIXROUTE:
        message = f"interface {name} has an address without a route to its prefix (noprefixroute)"
        return [Refusal(code="noprefixroute", message=message, object=name)]
    return []


def _rule_problems(netlink: Netlink) -> list[Refusal]:
    found = []
    for family in (links.AF_INET, links.AF_INET6):
        body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 0, 0, 0, 0, 0)
        for rule in netlink.dump("RTM_GETRULE", links.RTM_GETRULE, body):
            priority = as_int(attributes(rule, 12).get(_FRA_PRIORITY))
            if priority not in _DEFAULT_RULES:
                message = f"policy routing: rule {priority} is not one of the kernel's own"
                found.append(Refusal(code="policy-routing", message=message, object=str(priority)))
    return found


def _qdisc_problems(netlink: Netlink, names: dict[int, str]) -> list[Refusal]:
    found = []
    for body in netlink.dump("RTM_GETQDISC", links.RTM_GETQDISC, struct.pack("=BxxxiIII", 0, 0, 0, 0, 0)):
        _, index, handle, _, _ = struct.unpack_from("=BxxxiIII", body)
        if handle:  # The kernel's own default disciplines have none.
            kind = as_text(attributes(body, 20).get(_TCA_KIND))
            name = names.get(index, "?")
            found.append(Refusal(code="qdisc", message=f"interface {name} has a {kind} queue discipline", object=kind))
    return found


def _nftables_problems() -> list[Refusal]:
    try:
        with Netlink(NETLINK_NETFILTER) as netlink:
            tables = netlink.dump("NFT_MSG_GETTABLE", _NFT_MSG_GETTABLE, struct.pack("=BBH", 0, 0, 0))
    except KernelError as error:
        if error.errno in _NO_NFTABLES:
            return []
        raise
    found = []
    for body in tables:
        name = f"{_NF_FAMILIES.get(body[0], str(body[0]))} {as_text(attributes(body, 4).get(_NFTA_TABLE_NAME))}"
        message = f"nftables table '{name}' in the container's namespace: firewall rules are not carried yet"
        found.append(Refusal(code="nftables", message=message, object=name))
    return found


_NO_NFTABLES = {93, 22, 95, 2}  # EPROTONOSUPPORT, EINVAL (no nf_tables), EOPNOTSUPP, ENOENT
_LISTINGS = Path("/proc/thread-self/net")
_IPTABLES = (
    (socket.AF_INET, socket.IPPROTO_IP, "ip_tables_names", "iptables"),
    (socket.AF_INET6, socket.IPPROTO_IPV6, "ip6_tables_names", "ip6tables"),
)


def _iptables_problems() -> list[Refusal]:
    """Tables that are only loaded (a listing does that) are empty: one entry for each hook, and an end."""
    found = []
    for family, level, listing, program in _IPTABLES:
        if not (_LISTINGS / listing).exists():
            continue
        for table in (_LISTINGS / listing).read_text().split():
            with socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as raw:
                valid_hooks, entries = table_info(raw, level, table)
            if entries > valid_hooks.bit_count() + 1:
                message = f"{program} table {table} has {entries} entries: firewall rules are not carried yet"
                found.append(Refusal(code="iptables", message=message, object=f"{program} {table}"))
    return found


def table_info(raw: socket.socket, level: int, table: str) -> tuple[int, int]:
    """Mask of hooks and number of entries of an iptables table. The option takes its name in the buffer it fills."""
    buffer = ctypes.create_string_buffer(table.encode().ljust(32, b"\x00"), _XT_INFO.size)
    size_bytes = ctypes.c_uint32(_XT_INFO.size)
    if _libc.getsockopt(raw.fileno(), level, _SO_GET_INFO, buffer, ctypes.byref(size_bytes)) < 0:
        number = ctypes.get_errno()
        raise KernelError(f"getsockopt(IPT_SO_GET_INFO, {table})", number, os.strerror(number))
    fields = _XT_INFO.unpack(buffer.raw)
    return fields[1], fields[-2]
