"""Links, addresses, routes and neighbours of a namespace as typed values, and the messages that change them.

Every function takes an open `Netlink`, which decides the namespace.
Source: rtnetlink(7); linux/if_link.h, linux/if_addr.h, linux/rtnetlink.h, linux/neighbour.h, linux/veth.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING

from agent.network.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    as_int,
    as_text,
    attribute,
    attributes,
    message,
    nested,
    text,
    u8,
    u32,
)
from protocol.errors import KernelError

if TYPE_CHECKING:
    from agent.network.netlink import Netlink

# linux/rtnetlink.h
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_GETADDR = 20, 22
RTM_NEWROUTE, RTM_GETROUTE = 24, 26
RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30
RTM_GETRULE = 34
RTM_GETQDISC = 38
RTM_GETNSID = 90
RT_TABLE_MAIN = 254
RTN_UNICAST = 1
RTPROT_KERNEL = 2
RTNH_F_ONLINK = 4
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS, RTA_MULTIPATH, RTA_TABLE = (
    1,
    4,
    5,
    6,
    7,
    8,
    9,
    15,
)
RTA_VIA, RTA_ENCAP_TYPE, RTA_NH_ID = 18, 21, 30
# linux/if.h
IFF_UP, IFF_LOOPBACK, IFF_NOARP = 0x1, 0x8, 0x80
IF_OPER_UP = 6
# linux/if_link.h
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_PROTINFO = 1, 3, 4, 5, 10, 12
IFLA_OPERSTATE, IFLA_LINKINFO, IFLA_AF_SPEC, IFLA_NET_NS_FD, IFLA_LINK_NETNSID, IFLA_XDP = 16, 18, 26, 28, 37, 43
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
IFLA_INET6_ADDR_GEN_MODE = 8
IN6_ADDR_GEN_MODE_NONE = 1
IFLA_XDP_ATTACHED = 2
IFLA_BR_STP_STATE, IFLA_BR_VLAN_FILTERING = 5, 7
IFLA_BRPORT_LEARNING, IFLA_BRPORT_UNICAST_FLOOD, IFLA_BRPORT_MCAST_FLOOD, IFLA_BRPORT_BCAST_FLOOD = 8, 9, 27, 30
VETH_INFO_PEER = 1
# linux/if_addr.h
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_NODAD, IFA_F_TENTATIVE, IFA_F_PERMANENT, IFA_F_NOPREFIXROUTE = 0x02, 0x40, 0x80, 0x200
# linux/neighbour.h
NDA_DST, NDA_LLADDR = 1, 2
NTF_MASTER = 0x04
NUD_REACHABLE, NUD_STALE, NUD_DELAY, NUD_PROBE, NUD_PERMANENT = 0x02, 0x04, 0x08, 0x10, 0x80
# linux/net_namespace.h
NETNSA_NSID, NETNSA_FD = 1, 3
# linux/socket.h
AF_UNSPEC, AF_INET, AF_BRIDGE, AF_INET6 = 0, 2, 7, 10

SCOPES = {0: "global", 200: "site", 253: "link", 254: "host", 255: "nowhere"}
SCOPE_NUMBERS = {name: number for number, name in SCOPES.items()}
# linux/rtnetlink.h, RTPROT_*; others travel as their number.
PROTOCOLS = {0: "unspec", 1: "redirect", 2: "kernel", 3: "boot", 4: "static", 9: "ra", 16: "dhcp"}
PROTOCOL_NUMBERS = {name: number for number, name in PROTOCOLS.items()}

_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBi")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A network device. `peer_index` and `peer_namespace` (the kernel's id, -1: same) lead to a veth's other end."""

    index: int
    name: str
    kind: str  # 'veth', 'bridge', ...; '' for a hardware or loopback device
    mac: bytes
    mtu: int
    flags: int
    master: int
    operational: bool
    peer_index: int
    peer_namespace: int
    has_xdp: bool
    stp: bool  # of a bridge
    vlan_filtering: bool  # of a bridge

    @property
    def is_up(self) -> bool:
        return bool(self.flags & IFF_UP)

    @property
    def is_loopback(self) -> bool:
        return bool(self.flags & IFF_LOOPBACK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    index: int
    address: bytes
    peer: bytes  # of a point-to-point link; else the same as `address`
    prefix: int
    scope: int
    flags: int


def read_links(netlink: Netlink) -> list[Link]:
    return [_link(body) for body in netlink.dump("RTM_GETLINK", RTM_GETLINK, _LINK.pack(AF_UNSPEC, 0, 0, 0, 0))]


def find_link(netlink: Netlink, name: str) -> Link | None:
    """The device called `name`, or None."""
    body = _LINK.pack(AF_UNSPEC, 0, 0, 0, 0) + text(IFLA_IFNAME, name)
    try:
        return _link(netlink.get(f"RTM_GETLINK({name})", RTM_GETLINK, body))
    except KernelError as error:
        if error.errno == _ENODEV:
            return None
        raise


_ENODEV = 19


def need_link(netlink: Netlink, name: str, what: str) -> Link:
    """Raises: KernelError: ENODEV, saying what the device was needed for."""
    link = find_link(netlink, name)
    if link is None:
        raise KernelError(f"find {name}", _ENODEV, f"no such device on this host: it is to be {what}")
    return link


def _link(body: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(body)
    found = attributes(body, _LINK.size)
    info = attributes(found.get(IFLA_LINKINFO, b""))
    kind = as_text(info.get(IFLA_INFO_KIND))
    data = attributes(info.get(IFLA_INFO_DATA, b"")) if kind == "bridge" else {}
    peer_namespace = struct.unpack("=i", found[IFLA_LINK_NETNSID])[0] if IFLA_LINK_NETNSID in found else -1
    return Link(
        index=index,
        name=as_text(found.get(IFLA_IFNAME)),
        kind=kind,
        mac=found.get(IFLA_ADDRESS, b""),
        mtu=as_int(found.get(IFLA_MTU)),
        flags=flags,
        master=as_int(found.get(IFLA_MASTER)),
        operational=as_int(found.get(IFLA_OPERSTATE)) == IF_OPER_UP,
        peer_index=as_int(found.get(IFLA_LINK)),
        peer_namespace=peer_namespace,
        has_xdp=as_int(attributes(found.get(IFLA_XDP, b"")).get(IFLA_XDP_ATTACHED)) != 0,
        stp=as_int(data.get(IFLA_BR_STP_STATE)) != 0,
        vlan_filtering=as_int(data.get(IFLA_BR_VLAN_FILTERING)) != 0,
    )


def read_addresses(netlink: Netlink) -> list[Address]:
    """In the kernel's order, which is that of primary and secondary addresses."""
    found = []
    for body in netlink.dump("RTM_GETADDR", RTM_GETADDR, _ADDRESS.pack(AF_UNSPEC, 0, 0, 0, 0)):
        _, prefix, flags, scope, index = _ADDRESS.unpack_from(body)
        parts = attributes(body, _ADDRESS.size)
        peer = parts.get(IFA_ADDRESS, b"")
        local = parts.get(IFA_LOCAL, peer)
        flags = as_int(parts.get(IFA_FLAGS)) or flags
        found.append(Address(index=index, address=local, peer=peer or local, prefix=prefix, scope=scope, flags=flags))
    return found


def namespace_id(netlink: Netlink, namespace: int) -> int:
    """The id by which the socket's namespace knows another one (an open descriptor); -1: it does not know it."""
    body = struct.pack("=B3x", AF_UNSPEC) + u32(NETNSA_FD, namespace)
    parts = attributes(netlink.get("RTM_GETNSID", RTM_GETNSID, body), 4)
    return int(struct.unpack("=i", parts[NETNSA_NSID])[0]) if NETNSA_NSID in parts else -1


# ---------------------------------------------------------------- changes


def create_veth(
    netlink: Netlink,
    *,
    name: str,
    mac: bytes,
    peer_name: str,
    peer_mac: bytes,
    peer_namespace: int,
    mtu: int,
    peer_mtu: int,
) -> None:
    """Make a veth pair, both ends down: `name` here, `peer_name` in the namespace of an open descriptor.

    Raises: KernelError: EEXIST when a name is taken, and others.
    """
    identity = text(IFLA_IFNAME, peer_name) + attribute(IFLA_ADDRESS, peer_mac) + u32(IFLA_MTU, peer_mtu)
    peer = _LINK.pack(AF_UNSPEC, 0, 0, 0, 0) + identity + u32(IFLA_NET_NS_FD, peer_namespace)
    info = nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "veth"), nested(IFLA_INFO_DATA, attribute(VETH_INFO_PEER, peer)))
    body = (
        _LINK.pack(AF_UNSPEC, 0, 0, 0, 0) + text(IFLA_IFNAME, name) + attribute(IFLA_ADDRESS, mac) + u32(IFLA_MTU, mtu)
    )
    netlink.request(f"create veth {name} - {peer_name}", RTM_NEWLINK, body + info, NLM_F_CREATE | NLM_F_EXCL)


def delete_link(netlink: Netlink, name: str) -> None:
    """Delete a device; that there is none is success."""
    try:
        netlink.request(f"delete {name}", RTM_DELLINK, _LINK.pack(AF_UNSPEC, 0, 0, 0, 0) + text(IFLA_IFNAME, name))
    except KernelError as error:
        if error.errno != _ENODEV:
            raise


def change_link_message(index: int, *, set_flags: int = 0, clear_flags: int = 0, master: int | None = None) -> bytes:
    """A request that sets flags and the bridge (0: none) of a device: the master first, then the flags."""
    body = _LINK.pack(AF_UNSPEC, 0, index, set_flags, set_flags | clear_flags)
    if master is not None:
        body += u32(IFLA_MASTER, master)
    return message(RTM_NEWLINK, NLM_F_ACK, body)


def change_flags(netlink: Netlink, link: Link, *, set_flags: int = 0, clear_flags: int = 0) -> None:
    body = _LINK.pack(AF_UNSPEC, 0, link.index, set_flags, set_flags | clear_flags)
    netlink.request(f"set flags of {link.name}", RTM_NEWLINK, body)


def set_master(netlink: Netlink, link: Link, master: int) -> None:
    body = _LINK.pack(AF_UNSPEC, 0, link.index, 0, 0) + u32(IFLA_MASTER, master)
    netlink.request(f"set bridge of {link.name}", RTM_NEWLINK, body)


def set_mac(netlink: Netlink, link: Link, mac: bytes) -> None:
    body = _LINK.pack(AF_UNSPEC, 0, link.index, 0, 0) + attribute(IFLA_ADDRESS, mac)
    netlink.request(f"set address of {link.name}", RTM_NEWLINK, body)


def stop_link_local(netlink: Netlink, link: Link) -> None:
    """Let the kernel make no IPv6 link-local address for a device when it comes up."""
    mode = nested(IFLA_AF_SPEC, nested(AF_INET6, u8(IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE)))
    netlink.request(f"set addr_gen_mode of {link.name}", RTM_NEWLINK, _LINK.pack(AF_UNSPEC, 0, link.index, 0, 0) + mode)


def set_catcher_port(netlink: Netlink, link: Link) -> None:
    """Make a bridge port get what the forwarding table says and what goes to all, learn nothing, see no stray frame."""
    options = nested(
        IFLA_PROTINFO,
        u8(IFLA_BRPORT_LEARNING, 0),
        u8(IFLA_BRPORT_UNICAST_FLOOD, 0),
        u8(IFLA_BRPORT_MCAST_FLOOD, 1),
        u8(IFLA_BRPORT_BCAST_FLOOD, 1),
    )
    body = _LINK.pack(AF_BRIDGE, 0, link.index, 0, 0) + options
    netlink.request(f"set bridge port options of {link.name}", RTM_SETLINK, body)


def forwarding_message(mac: bytes, port_index: int) -> bytes:
    """A request that makes a bridge send what is for `mac` to a port, until it is learned elsewhere."""
    body = _NEIGHBOUR.pack(AF_BRIDGE, port_index, NUD_REACHABLE, NTF_MASTER, 0) + attribute(NDA_LLADDR, mac)
    return message(RTM_NEWNEIGH, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, body)


def add_address(netlink: Netlink, *, index: int, address: str, prefix: int, scope: str) -> None:
    """Add an address without duplicate detection: it was in use a moment ago, by us."""
    ip = ip_address(address)
    family = AF_INET if ip.version == 4 else AF_INET6
    body = _ADDRESS.pack(family, prefix, IFA_F_NODAD, SCOPE_NUMBERS.get(scope, 0), index)
    body += attribute(IFA_LOCAL, ip.packed) + attribute(IFA_ADDRESS, ip.packed)
    netlink.request(f"add address {address}/{prefix}", RTM_NEWADDR, body, NLM_F_CREATE | NLM_F_EXCL)


def neighbour_message(*, index: int, address: bytes, mac: bytes, permanent: bool) -> bytes:
    family = AF_INET if len(address) == 4 else AF_INET6
    state = NUD_PERMANENT if permanent else NUD_REACHABLE
    body = _NEIGHBOUR.pack(family, index, state, 0, 0) + attribute(NDA_DST, address) + attribute(NDA_LLADDR, mac)
    return message(RTM_NEWNEIGH, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, body)
