from __future__ import annotations

import dataclasses
import socket
import struct
from pathlib import Path

import msgspec
import pytest

from agent.network.build import create_network, host_names_for, remove_network
from agent.network.forget import forget_network
from agent.network.inspect import inspect_network, named_namespace_of, problems, read_network
from agent.network.links import Link, read_links
from agent.network.namespaces import (
    create_named_namespace,
    inside,
    is_named_namespace,
    namespace_of,
    remove_named_namespace,
)
from agent.network.netlink import (
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_CREATE,
    Batch,
    Netlink,
    attribute,
    message,
)
from agent.network.problems import record_problems, table_info
from protocol.errors import KernelError, UnsupportedError
from protocol.messages import Neighbour
from tests.agent.network.hosts import Container, Host, Lan

pytestmark = pytest.mark.root

NAMED = "/run/netns/web1"


def moved(network, host_name="m-web1"):
    """What the target must show of a network that was read on the source."""
    interfaces = [msgspec.structs.replace(one, host_name=host_name, bridge="br0") for one in network.interfaces]
    return msgspec.structs.replace(network, interfaces=interfaces)


def furnish(container: Container) -> None:
    container.sh("ip route add default via 10.77.0.11")
    container.sh("ip route add 10.99.0.0/16 via 10.77.0.12 metric 7")
    container.sh("ip -6 route add fd99::/64 via fd77::9")
    container.sh("ip neighbour add 10.77.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud reachable")
    container.sh("ip neighbour add fd77::9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent")
    container.sh("sysctl -qw net.ipv4.tcp_keepalive_time=123 net.ipv4.conf.eth0.rp_filter=2 net.core.somaxconn=77")
    container.sh("ip address add 10.77.0.51/24 dev eth0")
    container.sh("ip link set eth0 mtu 1400")


def test_a_network_built_from_what_was_read_reads_the_same(lan: Lan) -> None:
    source = Container(lan.one)
    furnish(source)
    before = source.network()
    target = Container(lan.two, plugged=False)
    built = lan.two.run(create_network, before, namespace_path=None, pid=target.pid, bridge="br0", host_name="m-web1")
    lan.two.run(built.attach)
    assert target.network() == moved(before)
    assert before.sysctls["ipv4/tcp_keepalive_time"] == "123"
    assert before.sysctls["core/somaxconn"] == "77"
    assert before.interfaces[0].sysctls["ipv4/conf/rp_filter"] == "2"
    assert before.interfaces[0].host_name == "veth1"
    assert {route.destination for route in before.routes} == {"default", "10.99.0.0/16", "fd99::/64"}
    assert len(before.interfaces[0].addresses) == 4  # two IPv4, one IPv6, the link-local one
    lan.two.run(built.close)


def test_a_gateway_that_each_host_has_is_the_targets_own(lan: Lan) -> None:
    for host in (lan.one, lan.two):
        host.sh("ip address add 10.77.0.1/24 dev br0")
    source = Container(lan.one)
    source.sh("ip neighbour add 10.77.0.1 lladdr 02:00:00:00:00:11 dev eth0 nud reachable")
    target = Container(lan.two, plugged=False)
    network = source.network()
    built = lan.two.run(create_network, network, namespace_path=None, pid=target.pid, bridge="br0", host_name="m-web1")
    (mac,) = [link.mac.hex(":") for link in lan.two.run(links_of_host) if link.name == "br0"]
    assert f"lladdr {mac}" in target.sh("ip neighbour show 10.77.0.1")
    built.set_neighbours([Neighbour(address="10.77.0.9", mac="02:00:00:00:00:09", interface="eth0")])
    assert "02:00:00:00:00:09" in target.sh("ip neighbour show 10.77.0.9")
    built.close()


def test_a_named_namespace_is_made_and_removed(lan: Lan) -> None:
    source = Container(lan.one)
    network = source.network()
    built = lan.two.run(create_network, network, namespace_path=NAMED, pid=None, bridge="br0", host_name="m-web1")
    pid = lan.two.start(f"nsenter --net={NAMED} sh -c 'echo ready; exec sleep 600'").pid
    config = b'{"linux":{"namespaces":[{"type":"pid"},{"type":"network","path":"/run/netns/web1"}]}}'
    assert lan.two.run(named_namespace_of, pid, config) == NAMED
    lan.two.run(built.attach)
    assert lan.two.run(read_network, pid, "br0") == moved(network)
    lan.two.run(built.close)
    lan.two.run(forget_network, msgspec.structs.replace(moved(network), path=NAMED))
    assert "m-web1" not in lan.two.sh("ip -br link")
    assert lan.two.sh("ls /run/netns") == ""
    lan.two.run(remove_network, NAMED, "m-web1")


def test_an_empty_named_namespace_is_used_and_stays_when_building_fails(lan: Lan) -> None:
    network = Container(lan.one).network()
    lan.two.run(create_named_namespace, NAMED)
    with pytest.raises(KernelError, match="br9"):
        lan.two.run(create_network, network, namespace_path=NAMED, pid=None, bridge="br9", host_name="m-web1")
    assert lan.two.run(is_named_namespace, NAMED)
    built = lan.two.run(create_network, network, namespace_path=NAMED, pid=None, bridge="br0", host_name="m-web1")
    lan.two.run(built.close)
    with pytest.raises(UnsupportedError, match="in use: it has eth0"):
        lan.two.run(create_network, network, namespace_path=NAMED, pid=None, bridge="br0", host_name="m-web2")
    lan.two.run(remove_network, NAMED, "m-web1")


def test_a_build_that_fails_leaves_nothing(lan: Lan) -> None:
    network = Container(lan.one).network()
    broken = msgspec.structs.replace(
        network, neighbours=[Neighbour(address="10.77.0.9", mac="01:02:03", interface="eth0")]
    )
    with pytest.raises(ValueError, match="MAC"):
        lan.two.run(create_network, broken, namespace_path=NAMED, pid=None, bridge="br0", host_name="m-web1")
    assert "m-web1" not in lan.two.sh("ip -br link")
    assert not lan.two.run(is_named_namespace, NAMED)


@pytest.mark.parametrize("path", ["/etc/passwd", "/run/netns/../x", "/run/netns/", "/run/netns/a/b", "run/netns/a"])
def test_a_path_outside_the_netns_directory_is_refused(lan: Lan, path: str) -> None:
    network = Container(lan.one).network()
    with pytest.raises(UnsupportedError):
        lan.two.run(create_network, network, namespace_path=path, pid=None, bridge="br0", host_name="m-web1")
    with pytest.raises(UnsupportedError):
        lan.two.run(remove_named_namespace, path)


def test_a_setting_with_a_path_in_it_is_refused(lan: Lan) -> None:
    network = msgspec.structs.replace(Container(lan.one).network(), sysctls={"ipv4/../../kernel/hostname": "x"})
    with pytest.raises(UnsupportedError, match="not a network setting"):
        lan.two.run(create_network, network, namespace_path=NAMED, pid=None, bridge="br0", host_name="m-web1")


def test_host_names_are_short_enough_for_the_kernel(lan: Lan) -> None:
    network = Container(lan.one).network()
    network = msgspec.structs.replace(network, interfaces=network.interfaces * 3)
    assert host_names_for(network, "m-0123456789abc") == ["m-0123456789abc", "m-0123456789a.1", "m-0123456789a.2"]


def test_a_network_with_nothing_but_lo_is_none(lan: Lan) -> None:
    container = Container(lan.one, plugged=False)
    network = container.network()
    assert network.kind == "none"
    built = lan.two.run(create_network, network, namespace_path=NAMED, pid=None, bridge="br0", host_name="m-web1")
    lan.two.run(built.attach)
    lan.two.run(built.announce)
    lan.two.run(built.close)


def test_the_hosts_own_network_is_refused(lan: Lan) -> None:
    pid = lan.one.start("sh -c 'echo ready; exec sleep 600'").pid
    inspection = lan.one.run(inspect_network, pid, "br0")
    assert inspection.network.kind == "host"
    assert [one.code for one in inspection.refusals] == ["host-network"]


def codes(host: Host, container: Container) -> list[str]:
    network = host.run(read_network, container.pid, "br0")
    return [one.code for one in host.run(problems, network, pid=container.pid, host_bridge="br0")]


@pytest.mark.parametrize(
    ("commands", "code"),
    [
        (["ip link add tap0 type bridge"], "interface-kind"),
        (["ip tuntap add dev tun0 mode tun"], "interface-kind"),
        (["ip link add link eth0 name mv0 type macvlan"], "interface-kind"),
        (["ip rule add from 10.77.0.50 table 100"], "policy-routing"),
        (["tc qdisc add dev eth0 root tbf rate 1gbit burst 1m latency 50ms"], "qdisc"),
        (["ip route add blackhole 10.1.0.0/16"], "route"),
        (["ip route add 10.1.0.0/16 via 10.77.0.9 mtu 1300"], "route"),
        (["ip address add 10.5.0.1 peer 10.5.0.2 dev eth0"], "peer-address"),
        (["ip address add 10.6.0.1/24 dev eth0 noprefixroute"], "noprefixroute"),
    ],
)
def test_what_cannot_be_carried_is_named(lan: Lan, commands: list[str], code: str) -> None:
    container = Container(lan.one)
    for command in commands:
        container.sh(command)
    assert codes(lan.one, container) == [code]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("ip link set veth1 nomaster", "no-bridge"),
        ("ip link set br0 type bridge stp_state 1", "stp-bridge"),
    ],
)
def test_a_host_end_that_cannot_be_cut_is_named(lan: Lan, command: str, code: str) -> None:
    container = Container(lan.one)
    lan.one.sh(command)
    assert codes(lan.one, container) == [code]


def test_a_bridge_that_filters_vlans_is_named(lan: Lan) -> None:
    network = Container(lan.one).network()
    with_filter = [dataclasses.replace(link, vlan_filtering=True) for link in lan.one.run(links_of_host)]
    assert [one.code for one in record_problems(network, "br0", with_filter)] == ["vlan-bridge"]


def links_of_host() -> list[Link]:
    with Netlink() as netlink:
        return read_links(netlink)


def test_another_bridge_than_the_agents_is_named(lan: Lan) -> None:
    network = Container(lan.one).network()
    assert [one.code for one in problems(network, host_bridge="cbr0")] == ["other-bridge"]


def test_only_settings_that_a_new_namespace_would_not_have_travel(lan: Lan) -> None:
    network = Container(lan.one).network()
    assert {key.split("/")[0] for key in network.sysctls} == {"ipv4"}
    assert {key.rpartition("/")[0] for key in network.interfaces[0].sysctls} == {"ipv4/conf"}


NFT_NEWTABLE, NFT_BATCH_BEGIN, NFT_BATCH_END = 10 << 8, 16, 17


def add_nftables_table(pid: int) -> None:
    batch = struct.pack(">BBH", 0, 0, 10)
    table = struct.pack(">BBH", 2, 0, 0) + attribute(1, b"filter\0")
    with inside(namespace_of(pid)), Netlink(NETLINK_NETFILTER) as netlink:
        data = message(NFT_BATCH_BEGIN, 0, batch)
        data += message(NFT_NEWTABLE, NLM_F_ACK | NLM_F_CREATE, table) + message(NFT_BATCH_END, 0, batch)
        netlink.run(Batch([("add table", data)]))


def test_a_firewall_in_the_container_is_named(lan: Lan) -> None:
    container = Container(lan.one)
    lan.one.run(add_nftables_table, container.pid)
    (refusal,) = lan.one.run(inspect_network, container.pid, "br0").refusals
    assert (refusal.code, refusal.object) == ("nftables", "ip filter")


def load_iptables_table(pid: int) -> bytes:
    with inside(namespace_of(pid)), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        table_info(raw, socket.IPPROTO_IP, "filter")
        return Path("/proc/thread-self/net/ip_tables_names").read_bytes()


def test_an_iptables_table_without_rules_is_no_firewall(lan: Lan) -> None:
    container = Container(lan.one)
    assert lan.one.run(load_iptables_table, container.pid) == b"filter\n"
    assert codes(lan.one, container) == []
