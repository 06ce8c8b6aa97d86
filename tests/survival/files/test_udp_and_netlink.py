"""UDP and netlink sockets are made again with their addresses."""

import os

import pytest

from agent.engine.native import files
from tests.survival.files import lan as lans
from tests.survival.files.conftest import dump, restore

pytestmark = [pytest.mark.root, pytest.mark.survival]


@pytest.fixture
def lan():
    made = lans.Lan(f"u{os.getpid()}")
    yield made
    made.close()


def test_udp_sockets_keep_address_peer_and_options(lan, puppets):
    source, target = puppets(namespace=lan.path("source")), puppets(namespace=lan.path("target"))
    peer = puppets(namespace=lan.path("peer"))
    source.run("a = socket.socket(2, 2); a.bind(('0.0.0.0', 5000)); a.setsockopt(1, 6, 1); a.setblocking(False)")
    source.run(f"b = socket.socket(10, 2); b.connect(({lans.PEER6!r}, 5001)); c = socket.socket(2, 2)")
    numbers = source.run("a.fileno(), b.fileno(), c.fileno()")
    name = source.run("b.getsockname()")
    restore(dump(source), target)
    lan.cut()
    lan.move_address()
    target.run(f"a, b, c = [socket.socket(fileno=n) for n in {numbers}]")
    assert target.run("a.getsockname(), a.getsockopt(1, 6)") == (("0.0.0.0", 5000), 1)
    assert target.run("b.getsockname(), b.getpeername()[:2]") == (name, (lans.PEER6, 5001))
    peer.run(f"p = socket.socket(2, 2); p.settimeout(5); p.sendto(b'x', ({lans.ADDRESS!r}, 5000))")
    assert target.run("select.select([a], [], [], 5)[0] and a.recv(10)") == b"x"


def test_datagrams_not_read_are_lost_with_a_warning(lan, puppets):
    source = puppets(namespace=lan.path("source"))
    source.run("a = socket.socket(2, 2); a.bind(('127.0.0.1', 5000)); a.sendto(b'x', ('127.0.0.1', 5000))")
    section = dump(source)
    assert len(section.warnings) == 1
    assert "5000" in section.warnings[0]


def test_a_multicast_member_is_refused(lan, puppets):
    source = puppets(namespace=lan.path("source"))
    source.run("a = socket.socket(2, 2)")
    assert files.check(files.CheckContext(pid=source.pid)).refusals == []
    source.run(f"a.setsockopt(0, 35, socket.inet_aton('239.1.2.3') + socket.inet_aton({lans.ADDRESS!r}))")
    assert [refusal.code for refusal in files.check(files.CheckContext(pid=source.pid)).refusals] == ["udp-multicast"]


def test_a_route_socket_keeps_port_and_groups(lan, puppets):
    source, target = puppets(namespace=lan.path("source")), puppets(namespace=lan.path("target"))
    n = source.run("n = socket.socket(16, 3, 0); n.bind((4711, 1))") or source.run("n.fileno()")
    restore(dump(source), target)
    target.run(f"n = socket.socket(fileno={n})")
    assert target.run("n.getsockname()") == (4711, 1)


def test_other_netlink_protocols_are_refused(lan, puppets):
    source = puppets(namespace=lan.path("source"))
    source.run("n = socket.socket(16, 3, 16)")
    assert [refusal.code for refusal in files.check(files.CheckContext(pid=source.pid)).refusals] == ["netlink"]
