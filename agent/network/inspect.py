"""Read the network of a running container, and find the host ends of its interfaces.

Does not survive: the lifetime of addresses and routes that came by DHCP or router advertisement (they become lasting),
labels and broadcast addresses, entries of the local table, multicast groups that no socket holds, counters.
Source: veth(4), network_namespaces(7), rtnetlink(7).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING

from agent.network import links, routes, sysctls
from agent.network.frames import mac_text
from agent.network.namespaces import OWN_NAMESPACE, inside, is_same_namespace, namespace_of
from agent.network.netlink import Netlink
from agent.network.problems import namespace_problems, record_problems
from protocol.messages import Interface, InterfaceAddress, Network

if TYPE_CHECKING:
    from agent.network.links import Address, Link
    from protocol.messages import Refusal

__all__ = ["Inspection", "inspect_network", "named_namespace_of", "problems", "read_network"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    network: Network
    refusals: list[Refusal]


def read_network(pid: int, host_bridge: str = "") -> Network:
    """The network of the container whose init is `pid` (as this thread's pid namespace sees it).

    Raises: KernelError: the process is gone, or the kernel refuses.
    """
    return inspect_network(pid, host_bridge).network


def problems(network: Network, *, pid: int = 0, host_bridge: str = "") -> list[Refusal]:
    """Why a network cannot move. Without `pid` only what the record itself shows.

    `host_bridge`: the bridge of the agent's settings; '' permits any, as long as it is one for all interfaces.
    Raises: KernelError: the process is gone, or the kernel refuses.
    """
    if pid == 0:
        return record_problems(network, host_bridge)
    return inspect_network(pid, host_bridge, path=network.path).refusals


def inspect_network(pid: int, host_bridge: str = "", *, path: str = "") -> Inspection:
    """The network of a container and every reason why it cannot move, in one pass. `path` is put into the record.

    Raises: KernelError: the process is gone, or the kernel refuses.
    """
    namespace = namespace_of(pid)
    if is_same_namespace(namespace, OWN_NAMESPACE):
        network = Network(kind="host")
        return Inspection(network=network, refusals=record_problems(network, host_bridge))
    fresh = sysctls.read_fresh()
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Netlink() as host:
            host_links = {link.index: link for link in links.read_links(host)}
            known_as = links.namespace_id(host, descriptor)
        with inside(descriptor), Netlink() as netlink:
            found = links.read_links(netlink)
            ends = {link.index: _host_end(link, host_links, known_as) for link in found if link.kind == "veth"}
            table = routes.read_routes(netlink, {link.index: link.name for link in found})
            addresses = links.read_addresses(netlink)
            carried = [link for link in found if link.kind == "veth"]
            interfaces = [
                _interface(
                    link, [one for one in addresses if one.index == link.index], fresh, ends[link.index], host_links
                )
                for link in carried
            ]
            network = Network(
                kind="namespace" if interfaces else "none",
                path=path,
                interfaces=interfaces,
                routes=table.routes,
                neighbours=routes.read_neighbours(netlink, {link.index: link.name for link in carried}),
                sysctls=sysctls.differing_namespace(sysctls.read_namespace(), fresh),
            )
            refusals = namespace_problems(netlink, found, addresses, table.beyond)
    finally:
        os.close(descriptor)
    return Inspection(network=network, refusals=refusals + record_problems(network, host_bridge, host_links.values()))


def named_namespace_of(pid: int, config_json: bytes) -> str:
    """The path of the network namespace that config.json names; '' when it names none, so that the runtime made one.

    Raises: KernelError: the path is gone. ValueError: config.json is not what the OCI specification says.
    """
    for entry in json.loads(config_json).get("linux", {}).get("namespaces", []):
        if entry.get("type") == "network":
            path = str(entry.get("path", ""))
            return path if path and is_same_namespace(path, namespace_of(pid)) else ""
    return ""


def _host_end(link: Link, host_links: dict[int, Link], known_as: int) -> Link | None:
    """The other end of a container's veth, when it is in the agent's own namespace."""
    candidate = host_links.get(link.peer_index)
    is_ours = (
        candidate is not None
        and candidate.kind == "veth"
        and candidate.peer_index == link.index
        and known_as >= 0
        and candidate.peer_namespace == known_as
    )
    return candidate if is_ours else None


def _interface(
    link: Link, addresses: list[Address], fresh: dict[str, str], end: Link | None, host_links: dict[int, Link]
) -> Interface:
    bridge = host_links.get(end.master) if end is not None else None
    return Interface(
        name=link.name,
        mac=mac_text(link.mac),
        mtu=link.mtu,
        addresses=[
            InterfaceAddress(
                address=str(ip_address(one.address)), prefix=one.prefix, scope=links.SCOPES.get(one.scope, "global")
            )
            for one in addresses
        ],
        sysctls=sysctls.differing_device(sysctls.read_device(link.name), fresh),
        up=link.is_up,
        host_name=end.name if end is not None else "",
        bridge=bridge.name if bridge is not None and bridge.kind == "bridge" else "",
    )
