"""Packets: real AF_PACKET sockets on a veth pair in a network namespace of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess

import pytest

from agent.engine import base
from agent.kernel.namespaces import in_network_namespace
from agent.network import capture
from agent.network.frames import VNET_HEADER_BYTES
from protocol.framing import FrameKind
from tests.agent.transfer.rig import TIMEOUT_S, Pair

pytestmark = [pytest.mark.root, pytest.mark.kernel]

CONTAINER = bytes.fromhex("020000000001")
CLIENT = bytes.fromhex("020000000002")
HEADER = bytes(VNET_HEADER_BYTES)


class Wire:
    """A veth pair: what is sent on one end is caught on the other."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.near, self.far = f"{name}a", f"{name}b"

    def sender(self):
        return self._in(lambda: capture.open_injector(self.near))

    def catcher(self):
        """Catches what is sent into the near end."""
        return self._in(lambda: capture.open_capture(self.far, CONTAINER, []))

    def _in(self, make):
        with in_network_namespace("/run/netns/" + self.name):
            return make()


@pytest.fixture
def wires():
    """Two wires, each in a namespace of its own."""
    names = [f"mt{os.getpid() % 100000}{suffix}" for suffix in "xy"]
    with contextlib.ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("-n", name, "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b")
            for end in "ab":
                _ip("netns", "exec", name, "sysctl", "-qw", f"net.ipv6.conf.{name}{end}.disable_ipv6=1")
                _ip("-n", name, "link", "set", f"{name}{end}", "up")
        yield [Wire(name) for name in names]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def pair():
    with Pair.start() as running:
        running.join()
        yield running


def tcp(sequence: int, data: bytes = b"", port: int = 6379) -> bytes:
    """A captured frame from the client to the container."""
    segment = struct.pack(">HHIIBBHHH", 40000, port, sequence, 0, 5 << 4, 0x18, 512, 0, 0) + data
    packet = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 64, 6, 0) + bytes([10, 0, 0, 2, 10, 0, 0, 1])
    return HEADER + CONTAINER + CLIENT + b"\x08\x00" + packet + segment


def numbered(number: int, size: int = 64) -> bytes:
    return HEADER + CONTAINER + CLIENT + b"\x88\xb5" + number.to_bytes(4, "big") + bytes(size)


def number_of(frame: bytes) -> int:
    return int.from_bytes(frame[VNET_HEADER_BYTES + 14 : VNET_HEADER_BYTES + 18], "big")


def receive(sock: socket.socket, count: int) -> list[bytes]:
    sock.setblocking(True)
    sock.settimeout(TIMEOUT_S)
    return [sock.recv(65536) for _ in range(count)]


def nothing_more(sock: socket.socket) -> bool:
    sock.settimeout(0.1)
    try:
        sock.recv(65536)
    except TimeoutError:
        return True
    return False


def wait_for_packets(stream, count: int) -> None:
    while stream.ask(base.StreamGetCounters()).packets < count:
        pass


def test_packets_are_held_and_go_in_in_order_when_released(pair, wires):
    outside, inside = wires
    with outside.catcher() as catcher, outside.sender() as client, inside.sender() as inject, inside.catcher() as seen:
        pair.source.engine.send(base.CapturePackets(), [catcher.fileno()])
        pair.target.service.send(base.StreamInject(), [inject.fileno()])
        for number in range(200):
            client.send(numbered(number, size=number * 5))
        wait_for_packets(pair.target, 200)
        assert nothing_more(seen)
        pair.target.engine.send(base.ReleasePackets(receive_next={}))
        assert [number_of(frame) for frame in receive(seen, 200)] == list(range(200))
        for number in range(200, 210):
            client.send(numbered(number))
        assert [number_of(frame) for frame in receive(seen, 10)] == list(range(200, 210))


def test_packets_that_come_before_the_injector_wait_for_it(pair, wires):
    outside, inside = wires
    with outside.catcher() as catcher, outside.sender() as client, inside.sender() as inject, inside.catcher() as seen:
        pair.source.engine.send(base.CapturePackets(), [catcher.fileno()])
        client.send(numbered(1))
        wait_for_packets(pair.target, 1)
        pair.target.engine.send(base.ReleasePackets(receive_next={}))
        pair.target.service.send(base.StreamInject(), [inject.fileno()])
        assert number_of(receive(seen, 1)[0]) == 1


def test_data_that_the_socket_has_already_is_left_out(pair, wires):
    outside, inside = wires
    with outside.catcher() as catcher, outside.sender() as client, inside.sender() as inject, inside.catcher() as seen:
        pair.source.engine.send(base.CapturePackets(), [catcher.fileno()])
        pair.target.service.send(base.StreamInject(), [inject.fileno()])
        frames = [tcp(1000, b"old" * 10), tcp(1030, b"half new!!"), tcp(1035), tcp(1000, b"x" * 30, port=80)]
        for frame in frames:
            client.send(frame)
        wait_for_packets(pair.target, 4)
        pair.target.engine.send(base.ReleasePackets(receive_next={"10.0.0.1 6379 10.0.0.2 40000": 1035}))
        assert [frame[VNET_HEADER_BYTES:] for frame in receive(seen, 2)] == [f[VNET_HEADER_BYTES:] for f in frames[1:3]]
        assert nothing_more(seen)
        # A connection that was not dumped would be answered by a reset: not before the answer can leave.
        pair.target.service.send(base.StreamAttached())
        assert receive(seen, 1)[0][VNET_HEADER_BYTES:] == frames[3][VNET_HEADER_BYTES:]
        assert nothing_more(seen)


def test_packets_do_not_wait_for_a_section(pair, wires):
    outside, inside = wires
    with outside.catcher() as catcher, outside.sender() as client, inside.sender() as inject, inside.catcher() as seen:
        pair.source.engine.send(base.CapturePackets(), [catcher.fileno()])
        pair.target.service.send(base.StreamInject(), [inject.fileno()])
        pair.target.engine.send(base.ReleasePackets(receive_next={}))
        pair.source.engine.send_frame(FrameKind.SECTION, b"slow")
        assert pair.target.engine.receive(TIMEOUT_S).payload == b"slow"
        client.send(numbered(7))
        assert number_of(receive(seen, 1)[0]) == 7


@pytest.mark.parametrize("target_dies", [False, True])
def test_on_a_roll_back_the_packets_go_back_in_order(pair, wires, target_dies):
    outside, inside = wires
    with outside.catcher() as catcher, outside.sender() as client, inside.sender() as back, inside.catcher() as seen:
        pair.source.engine.send(base.CapturePackets(), [catcher.fileno()])
        for number in range(50):
            client.send(numbered(number))
        wait_for_packets(pair.source, 50)
        if target_dies:
            pair.target.process.kill()
            assert isinstance(pair.source.hear(), base.StreamFailed)
            for number in range(50, 60):
                client.send(numbered(number))
            wait_for_packets(pair.source, 60)
        count = 60 if target_dies else 50
        replayed = pair.source.ask(base.StreamReplay(), [back.fileno()])
        assert replayed == base.StreamReplayed(packets=count)
        assert [number_of(frame) for frame in receive(seen, count)] == list(range(count))
        client.send(numbered(count))
        assert number_of(receive(seen, 1)[0]) == count


def test_more_than_the_bound_is_dropped_and_counted(pair, wires):
    outside, _ = wires
    with outside.catcher() as catcher, outside.sender() as client:
        pair.source.engine.send(base.CapturePackets(), [catcher.fileno()])
        for number in range(20_100):
            client.send(numbered(number, size=0))
            if number % 1000 == 999:
                wait_for_packets(pair.source, number + 1)
        wait_for_packets(pair.target, 20_100)
        assert pair.target.ask(base.StreamGetCounters()).packets_dropped == 100
        assert pair.source.ask(base.StreamGetCounters()).packets_dropped == 100
