"""Routes of the main table and neighbours: between the kernel's form and the records that travel.

Source: rtnetlink(7), RTM_GETROUTE, RTM_GETNEIGH.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING

from agent.network import links
from agent.network.frames import mac_text
from agent.network.netlink import NLM_F_CREATE, NLM_F_EXCL, as_int, attribute, attributes, u32
from protocol.messages import Neighbour, Route

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent.network.netlink import Netlink

_ROUTE = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_FAMILIES = (links.AF_INET, links.AF_INET6)
_USED_NEIGHBOURS = links.NUD_REACHABLE | links.NUD_STALE | links.NUD_DELAY | links.NUD_PROBE | links.NUD_PERMANENT
# What a Route cannot say; a route with one of these is refused.
_BEYOND = {
    links.RTA_METRICS: "metrics",
    links.RTA_MULTIPATH: "several next hops",
    links.RTA_VIA: "a gateway of the other family",
    links.RTA_ENCAP_TYPE: "an encapsulation",
    links.RTA_NH_ID: "a next hop object",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTable:
    """The routes that can travel, and for each that cannot (text of the route, why)."""

    routes: list[Route]
    beyond: list[tuple[str, str]]


def read_routes(netlink: Netlink, names: Mapping[int, str]) -> RouteTable:
    """The main table of both families without what the kernel makes by itself. `names`: device names by index."""
    routes: list[Route] = []
    beyond: list[tuple[str, str]] = []
    for family in _FAMILIES:
        body = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        for found in netlink.dump("RTM_GETROUTE", links.RTM_GETROUTE, body):
            header = _ROUTE.unpack_from(found)
            parts = attributes(found, _ROUTE.size)
            if (as_int(parts.get(links.RTA_TABLE)) or header[4]) != links.RT_TABLE_MAIN:
                continue
            if header[5] == links.RTPROT_KERNEL:
                continue
            route = _route(header, parts, names)
            reasons = [why for kind, why in _BEYOND.items() if kind in parts]
            if header[7] != links.RTN_UNICAST:
                reasons.append(f"type {header[7]}, not unicast")
            if header[3]:
                reasons.append(f"type of service {header[3]}")
            beyond += [(route.destination, why) for why in reasons]
            if not reasons:
                routes.append(route)
    return RouteTable(routes=routes, beyond=beyond)


def _route(header: tuple[int, ...], parts: Mapping[int, bytes], names: Mapping[int, str]) -> Route:
    family, prefix, _, _, _, protocol, scope, _, _ = header
    destination = "default"
    if links.RTA_DST in parts:
        destination = f"{ip_address(parts[links.RTA_DST])}/{prefix}"
    elif family == links.AF_INET6:
        destination = "::/0"
    gateway = str(ip_address(parts[links.RTA_GATEWAY])) if links.RTA_GATEWAY in parts else ""
    source = str(ip_address(parts[links.RTA_PREFSRC])) if links.RTA_PREFSRC in parts else ""
    index = as_int(parts.get(links.RTA_OIF))
    return Route(
        destination=destination,
        gateway=gateway,
        interface=names.get(index, ""),
        metric=as_int(parts.get(links.RTA_PRIORITY)),
        scope=links.SCOPES.get(scope, str(scope)),
        source=source,
        protocol=links.PROTOCOLS.get(protocol, str(protocol)),
    )


def destination_network(route: Route) -> IPv4Network | IPv6Network:
    """Raises: ValueError: the destination is no prefix."""
    if route.destination == "default":
        return ip_network("::/0" if ":" in route.gateway else "0.0.0.0/0")
    return ip_network(route.destination)


def add_route(netlink: Netlink, route: Route, indexes: Mapping[str, int]) -> None:
    """Add a route to the main table. A gateway need not be within a prefix of ours: it was reachable on the source.

    Raises: KernelError. ValueError: an address in it is none.
    """
    network = destination_network(route)
    family = links.AF_INET if network.version == 4 else links.AF_INET6
    protocol = links.PROTOCOL_NUMBERS.get(route.protocol)
    scope = links.SCOPE_NUMBERS.get(route.scope)
    body = _ROUTE.pack(
        family,
        network.prefixlen,
        0,
        0,
        links.RT_TABLE_MAIN,
        int(route.protocol or 0) if protocol is None else protocol,
        int(route.scope or 0) if scope is None else scope,
        links.RTN_UNICAST,
        links.RTNH_F_ONLINK if route.gateway and route.interface else 0,
    )
    if network.prefixlen:
        body += attribute(links.RTA_DST, network.network_address.packed)
    if route.gateway:
        body += attribute(links.RTA_GATEWAY, ip_address(route.gateway).packed)
    if route.interface:
        body += u32(links.RTA_OIF, indexes[route.interface])
    if route.source:
        body += attribute(links.RTA_PREFSRC, ip_address(route.source).packed)
    if route.metric:
        body += u32(links.RTA_PRIORITY, route.metric)
    netlink.request(f"add route {route.destination}", links.RTM_NEWROUTE, body, NLM_F_CREATE | NLM_F_EXCL)


def read_neighbours(netlink: Netlink, names: Mapping[int, str]) -> list[Neighbour]:
    """Every neighbour whose MAC address is known, learned or set by hand, on the devices in `names`."""
    found = []
    for family in _FAMILIES:
        for body in netlink.dump("RTM_GETNEIGH", links.RTM_GETNEIGH, _NEIGHBOUR.pack(family, 0, 0, 0, 0)):
            _, index, state, _, _ = _NEIGHBOUR.unpack_from(body)
            parts = attributes(body, _NEIGHBOUR.size)
            mac = parts.get(links.NDA_LLADDR, b"")
            if index not in names or not state & _USED_NEIGHBOURS or len(mac) != 6:
                continue
            found.append(
                Neighbour(
                    address=str(ip_address(parts[links.NDA_DST])),
                    mac=mac_text(mac),
                    interface=names[index],
                    permanent=bool(state & links.NUD_PERMANENT),
                )
            )
    return sorted(found, key=lambda one: (one.interface, one.address))
