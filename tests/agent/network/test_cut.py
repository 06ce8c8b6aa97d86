from __future__ import annotations

import select
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from agent.network.build import create_network, remove_network
from agent.network.capture import drain, inject
from agent.network.cut import catcher_name, prepare_cut, remove_catcher, undo_cut
from agent.network.frames import is_answered_at_once
from protocol.errors import KernelError
from tests.agent.network.hosts import Container, Host, Lan

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.network.build import BuiltNetwork
    from agent.network.cut import Cut

pytestmark = pytest.mark.root

SERVICE = ("10.77.0.50", 6000)
BEFORE_A_RETRANSMISSION_S = 0.19  # 200 ms for data, 1 s for a SYN and for ARP


def met(host: Host) -> None:
    """`host` knows the container's MAC, and every bridge its port."""
    with host.open(socket.SOCK_STREAM) as probe:
        assert probe.connect_ex(("10.77.0.50", 9)) == 111  # refused: it answered


def wait_for(fact: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not fact():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


class Move:
    """A container on host one, cut off, and its network on host two."""

    def __init__(self, lan: Lan) -> None:
        self.held: list[bytes] | None = []
        self.source = Container(lan.one)
        self.network = self.source.network()
        self.target = Container(lan.two, plugged=False)
        self.cut: Cut = lan.one.run(prepare_cut, self.network.interfaces[0])
        self.built: BuiltNetwork = lan.two.run(
            create_network, self.network, namespace_path=None, pid=self.target.pid, bridge="br0", host_name="m-web1"
        )

    def forward(self) -> int:
        """What the stream processes do: read here, inject there; what is answered at once waits for `attach`."""
        count = 0
        for frame in drain(self.cut.capture_socket()):
            if self.cut.is_wanted(frame):
                count += 1
                if self.held is not None and is_answered_at_once(frame, ()):
                    self.held.append(frame)
                else:
                    inject(self.built.inject_socket(), frame)
        return count

    def attach(self) -> None:
        self.built.attach()
        self.built.announce()
        for frame in self.held or ():
            inject(self.built.inject_socket(), frame)
        self.held = None

    def close(self) -> None:
        self.cut.close()
        self.built.close()


@pytest.fixture
def move(lan: Lan):
    made = Move(lan)
    yield made
    made.close()


@pytest.mark.parametrize("who", ["client", "one", "two"])
def test_a_datagram_sent_during_the_cut_arrives_at_the_target(lan: Lan, move: Move, who: str) -> None:
    sender_host: Host = getattr(lan, who)
    met(sender_host)
    with sender_host.open(socket.SOCK_DGRAM) as sender, move.target.open(socket.SOCK_DGRAM, 6000) as receiver:
        move.cut.cut()
        sender.sendto(b"caught", SERVICE)
        sender.sendto(b"too", SERVICE)
        wait_for(lambda: move.forward() > 0)
        assert receiver.recv(100) == b"caught"
        move.forward()
        assert receiver.recv(100) == b"too"


@pytest.mark.parametrize("who", ["client", "one", "two"])
def test_a_connection_begun_during_the_cut_waits_for_no_retransmission(lan: Lan, move: Move, who: str) -> None:
    """From the own host the checksums are not computed yet: the virtio header has to carry that."""
    sender_host: Host = getattr(lan, who)
    met(sender_host)
    listener = move.target.open(socket.SOCK_STREAM, 6000)
    connecting = sender_host.open(socket.SOCK_STREAM)
    start_s = time.monotonic()
    move.cut.cut()
    connecting.setblocking(False)
    assert connecting.connect_ex(SERVICE) == 115
    wait_for(lambda: move.forward() > 0)
    move.attach()
    accepted, _ = listener.accept()
    move.forward()
    connecting.settimeout(5)
    connecting.sendall(b"x" * 200_000)
    received = 0
    while received < 200_000:
        received += len(accepted.recv(1 << 20))
    assert time.monotonic() - start_s < BEFORE_A_RETRANSMISSION_S
    for one in (listener, connecting, accepted):
        one.close()


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "10.77.0.50"), (socket.AF_INET6, "fd77::50")])
def test_a_question_for_the_address_during_the_cut_is_answered_by_the_target(
    lan: Lan, move: Move, family: int, address: str
) -> None:
    with lan.client.open(socket.SOCK_STREAM, family) as asking:
        start_s = time.monotonic()
        move.cut.cut()
        asking.setblocking(False)
        assert asking.connect_ex((address, 9)) == 115
        wait_for(lambda: move.forward() > 0)
        move.attach()
        select.select([], [asking], [], 5)
        assert asking.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 111  # refused: it answered
        assert time.monotonic() - start_s < BEFORE_A_RETRANSMISSION_S


def test_putting_it_back_delivers_what_was_caught(lan: Lan, move: Move) -> None:
    met(lan.client)
    with lan.client.open(socket.SOCK_DGRAM) as sender, move.source.open(socket.SOCK_DGRAM, 6000) as receiver:
        move.cut.cut()
        for number in range(10):
            sender.sendto(b"%d" % number, SERVICE)
        taken: list[bytes] = []

        def all_taken() -> bool:
            taken.extend(drain(move.cut.capture_socket()))
            return len(taken) >= 10

        wait_for(all_taken)
        sender.sendto(b"10", SERVICE)
        move.cut.uncut(taken)
        sender.sendto(b"11", SERVICE)
        assert [int(receiver.recv(100)) for _ in range(12)] == list(range(12))
    assert "master br0" in lan.one.sh("ip link show veth1")
    assert "NOARP" not in lan.one.sh("ip link show veth1")


def test_under_a_stream_of_datagrams_cut_and_back_loses_and_doubles_none(lan: Lan, move: Move) -> None:
    met(lan.client)
    ends = threading.Event()
    sent = 0

    def send() -> None:
        nonlocal sent
        while not ends.is_set():
            sender.sendto(sent.to_bytes(4, "big"), SERVICE)
            sent += 1
            time.sleep(0.0001)

    with lan.client.open(socket.SOCK_DGRAM) as sender, move.source.open(socket.SOCK_DGRAM, 6000) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)
        thread = threading.Thread(target=send)
        thread.start()
        for _ in range(10):
            time.sleep(0.005)
            move.cut.cut()
            time.sleep(0.005)
            move.cut.uncut()
        ends.set()
        thread.join()
        got = sorted(int.from_bytes(receiver.recv(4), "big") for _ in range(sent))
        assert got == list(range(sent))
        receiver.setblocking(False)
        with pytest.raises(BlockingIOError):
            receiver.recv(4)
    assert move.cut.statistics()[1] == 0


@pytest.mark.parametrize("who", ["client", "one", "two"])
def test_after_attach_and_announce_all_traffic_goes_to_the_target(lan: Lan, move: Move, who: str) -> None:
    sender_host: Host = getattr(lan, who)
    met(sender_host)
    with sender_host.open(socket.SOCK_DGRAM) as sender, move.target.open(socket.SOCK_DGRAM, 6000) as receiver:
        move.cut.cut()
        move.attach()
        sender.sendto(b"hello", SERVICE)
        assert receiver.recv(100) == b"hello"
        assert [frame for frame in drain(move.cut.capture_socket()) if move.cut.is_wanted(frame)] == []


def test_before_attach_nothing_of_the_target_is_seen(lan: Lan, move: Move) -> None:
    met(lan.client)
    with (
        lan.client.open(socket.SOCK_DGRAM) as sender,
        move.source.open(socket.SOCK_DGRAM, 6000) as receiver,
        move.target.open(socket.SOCK_DGRAM, 6000) as quiet,
    ):
        sender.sendto(b"still here", SERVICE)
        assert receiver.recv(100) == b"still here"
        quiet.setblocking(False)
        with pytest.raises(BlockingIOError):
            quiet.recv(100)


def test_traffic_of_others_is_not_caught(lan: Lan, move: Move) -> None:
    move.cut.cut()
    lan.client.sh("ip neighbour flush all")
    with lan.client.open(socket.SOCK_STREAM) as probe:
        assert probe.connect_ex(("10.77.0.12", 9)) == 111
    assert list(drain(move.cut.capture_socket())) == []


def test_the_bridge_keeps_its_address(lan: Lan) -> None:
    source = Container(lan.one)
    lan.one.sh("ip link set veth1 address 02:00:00:00:00:01")  # the lowest: the bridge takes it
    assert "02:00:00:00:00:01" in lan.one.sh("ip link show br0")
    cut = lan.one.run(prepare_cut, source.network().interfaces[0])
    cut.cut()
    cut.close()
    assert "02:00:00:00:00:01" in lan.one.sh("ip link show br0")


def test_a_small_mtu_in_the_container_does_not_make_the_bridges_small(lan: Lan) -> None:
    source = Container(lan.one)
    source.sh("ip link set eth0 mtu 1280")
    network = source.network()
    cut = lan.one.run(prepare_cut, network.interfaces[0])
    target = Container(lan.two, plugged=False)
    built = lan.two.run(create_network, network, namespace_path=None, pid=target.pid, bridge="br0", host_name="m-web1")
    cut.cut()
    built.attach()
    assert "mtu 1500" in lan.one.sh("ip link show br0")
    assert "mtu 1500" in lan.two.sh("ip link show br0")
    assert "mtu 1280" in target.sh("ip link show eth0")
    cut.close()
    built.close()


def test_undo_by_names_is_idempotent_and_leaves_nothing(lan: Lan, move: Move) -> None:
    met(lan.client)
    catcher = catcher_name(move.network.interfaces[0])
    assert catcher in lan.one.sh("ip -br link")
    move.cut.cut()
    for _ in range(2):
        lan.one.run(undo_cut, host_name="veth1", bridge="br0", catcher=catcher)
        assert catcher not in lan.one.sh("ip -br link")
        assert "master br0" in lan.one.sh("ip link show veth1")
        met(lan.client)
    lan.one.run(remove_catcher, catcher)
    for _ in range(2):
        lan.two.run(remove_network, "", "m-web1")
        assert "m-web1" not in lan.two.sh("ip -br link")


def test_undo_of_a_container_that_is_gone_succeeds(lan: Lan, move: Move) -> None:
    move.cut.cut()
    lan.one.sh("ip link delete veth1")
    lan.one.run(undo_cut, host_name="veth1", bridge="br0", catcher=move.cut.catcher)
    assert move.cut.catcher not in lan.one.sh("ip -br link")


def test_a_catcher_vanishes_with_the_process_that_held_it(lan: Lan, move: Move) -> None:
    move.cut.capture_socket().close()
    wait_for(lambda: move.cut.catcher not in lan.one.sh("ip -br link"))


def test_cutting_what_is_gone_says_so(lan: Lan, move: Move) -> None:
    lan.one.sh("ip link delete veth1")
    with pytest.raises(KernelError, match="detach veth1"):
        move.cut.cut()


def test_a_container_that_is_on_no_bridge_cannot_be_cut(lan: Lan) -> None:
    interface = Container(lan.one).network().interfaces[0]
    lan.one.sh("ip link set veth1 nomaster")
    with pytest.raises(KernelError, match="no port of bridge br0"):
        lan.one.run(prepare_cut, interface)
    assert "mc0" not in lan.one.sh("ip -br link")
