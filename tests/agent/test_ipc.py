"""Ports between the processes of an agent: whole frames, descriptors in order, ends that are noticed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from agent.engine import base
from agent.ipc import AsyncPort, Port, PortClosedError, make_pair
from protocol.framing import Frame, FrameKind, encode_frame

LARGE_BYTES = 24 << 20  # several times what fits into the socket


def make_pipes(count: int) -> list[tuple[int, int]]:
    return [os.pipe() for _ in range(count)]


def close_all(pipes: list[tuple[int, int]]) -> None:
    for pipe in pipes:
        for fd in pipe:
            with contextlib.suppress(OSError):
                os.close(fd)


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def same_file(one: int, other: int) -> bool:
    return os.path.sameopenfile(one, other)


@pytest.fixture
def ports() -> Iterator[tuple[Port, Port]]:
    one, other = make_pair()
    ends = Port(one, base.ToStream, "service"), Port(other, base.FromStream, "stream")
    yield ends
    for end in ends:
        end.close()


def test_a_record_arrives_as_it_was(ports: tuple[Port, Port]):
    one, other = ports
    one.send(base.StreamKey(public_key="ssh-ed25519 A"))
    frame = other.receive(5)
    assert frame.kind is FrameKind.LOCAL
    assert other.parse(frame) == base.StreamKey(public_key="ssh-ed25519 A")


def test_frames_of_other_kinds_pass_unread(ports: tuple[Port, Port]):
    one, other = ports
    one.send_frame(FrameKind.AGENT, b"anything")
    one.send_frame(FrameKind.SECTION, b"")
    assert [other.receive(5), other.receive(5)] == [Frame(FrameKind.AGENT, b"anything"), Frame(FrameKind.SECTION, b"")]


def test_descriptors_come_in_the_order_they_were_sent(ports: tuple[Port, Port]):
    one, other = ports
    pipes = make_pipes(4)
    try:
        one.send(base.StreamUp(), [pipes[0][0], pipes[1][0]])
        one.send(base.StreamUp())
        one.send(base.StreamUp(), [pipes[2][0]])
        one.send(base.StreamUp(), [pipes[3][0]])
        for _ in range(4):
            other.receive(5)
        got = other.take_fds(1) + other.take_fds(3)
        assert all(same_file(fd, read_end) for fd, (read_end, _) in zip(got, pipes, strict=True))
        assert not any(os.get_inheritable(fd) for fd in got)
        for fd in got:
            os.close(fd)
    finally:
        close_all(pipes)


def test_descriptors_ride_on_a_frame_that_does_not_fit_the_socket(ports: tuple[Port, Port]):
    one, other = ports
    payload = os.urandom(LARGE_BYTES)
    pipes = make_pipes(1)
    sender = threading.Thread(target=lambda: one.send_frame(FrameKind.PAGES, payload, [pipes[0][0]]))
    sender.start()
    assert other.receive(10).payload == payload
    sender.join()
    (got,) = other.take_fds(1)
    assert same_file(got, pipes[0][0])
    os.close(got)
    close_all(pipes)


def test_a_promised_descriptor_that_did_not_come_is_an_error(ports: tuple[Port, Port]):
    with pytest.raises(PortClosedError, match="promised 1 descriptors and sent 0"):
        ports[0].take_fds(1)


def test_descriptors_that_nobody_took_are_closed_with_the_port():
    before = open_descriptors()
    one, other = make_pair()
    sender, receiver = Port(one, base.ToStream, "a"), Port(other, base.ToStream, "b")
    pipes = make_pipes(3)
    sender.send(base.StreamUp(), [end for pipe in pipes for end in pipe])
    receiver.receive(5)
    close_all(pipes)
    sender.close()
    receiver.close()
    assert open_descriptors() == before


def test_what_was_sent_before_the_end_is_received_before_the_end_is_told(ports: tuple[Port, Port]):
    one, other = ports
    one.send(base.StreamUp(peer="x"))
    one.close()
    assert other.receive(5).kind is FrameKind.LOCAL
    with pytest.raises(PortClosedError, match="the stream process is gone"):
        other.receive(5)
    with pytest.raises(PortClosedError):
        for _ in range(2):
            other.send(base.StreamUp())


def test_a_silent_peer_is_a_timeout(ports: tuple[Port, Port]):
    with pytest.raises(TimeoutError):
        ports[0].receive(0.01)
    ports[1].send(base.StreamUp())
    assert ports[0].receive().kind is FrameKind.LOCAL


def test_a_buffer_is_larger_than_a_frame_of_pages():
    one, other = make_pair()
    assert one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > 1 << 20
    one.close()
    other.close()


class Collector:
    """An AsyncPort whose frames and end are kept."""

    def __init__(self, sock: socket.socket) -> None:
        self.frames: list[Frame] = []
        self.ends = 0
        self.news = asyncio.Event()
        self.pause_after = -1
        self.port = AsyncPort(sock, base.ToStream, "engine", on_frame=self._frame, on_closed=self._closed)

    def _frame(self, frame: Frame) -> None:
        self.frames.append(frame)
        if len(self.frames) == self.pause_after:
            self.port.pause()
        self.news.set()

    def _closed(self) -> None:
        self.ends += 1
        self.news.set()

    async def until(self, count: int = 0, ends: int = 0) -> None:
        async with asyncio.timeout(10):
            while len(self.frames) < count or self.ends < ends:
                self.news.clear()
                await self.news.wait()


def payloads(collector: Collector) -> list[bytes]:
    return [frame.payload for frame in collector.frames]


def test_async_frames_and_descriptors_keep_their_order_when_the_socket_is_full():
    before = open_descriptors()

    async def main() -> None:
        one, other = make_pair()
        sender = Collector(one)
        pipes = make_pipes(6)
        # Nobody reads yet: what follows waits, and the caller may close its own descriptors at once.
        sender.port.send_frame(FrameKind.PAGES, b"0" * LARGE_BYTES, [pipes[0][0]])
        for number in range(1, 6):
            sender.port.send_frame(FrameKind.PAGES, b"%d" % number * number, [pipes[number][0]])
        kept = [os.dup(read_end) for read_end, _ in pipes]
        close_all(pipes)
        receiver = Collector(other)
        await sender.port.drain()
        await receiver.until(6)
        assert payloads(receiver) == [b"0" * LARGE_BYTES, b"1", b"22", b"333", b"4444", b"55555"]
        got = receiver.port.take_fds(6)
        assert all(same_file(a, b) for a, b in zip(got, kept, strict=True))
        for fd in got + kept:
            os.close(fd)
        sender.port.close()
        receiver.port.close()

    asyncio.run(main())
    assert open_descriptors() == before


@pytest.mark.parametrize("how", ["we close", "the peer goes"])
def test_descriptors_that_still_wait_are_closed_with_the_port(how: str):
    before = open_descriptors()

    async def main() -> None:
        one, other = make_pair()
        sender = Collector(one)
        pipes = make_pipes(3)
        for pipe in pipes:
            sender.port.send_frame(FrameKind.PAGES, bytes(LARGE_BYTES), pipe)
        close_all(pipes)
        if how == "we close":
            sender.port.close()
            await sender.port.drain()
            other.close()
            return
        other.close()
        await sender.until(ends=1)

    asyncio.run(main())
    assert open_descriptors() == before


def test_drain_waits_until_a_slow_reader_has_made_room():
    async def main() -> None:
        one, other = make_pair()
        sender = Collector(one)
        sender.port.send_frame(FrameKind.PAGES, bytes(LARGE_BYTES))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await sender.port.drain()
        receiver = Collector(other)
        await sender.port.drain()
        await receiver.until(1)
        sender.port.close()
        receiver.port.close()

    asyncio.run(main())


def test_a_paused_port_gives_nothing_until_it_is_resumed_and_then_all_in_order():
    async def main() -> None:
        one, other = make_pair()
        receiver = Collector(other)
        receiver.pause_after = 2
        for number in range(5):
            one.sendall(encode_frame(FrameKind.PAGES, b"%d" % number))
        await receiver.until(2)
        await asyncio.sleep(0)
        assert payloads(receiver) == [b"0", b"1"]
        receiver.port.resume()
        await receiver.until(5)
        assert payloads(receiver) == [b"0", b"1", b"2", b"3", b"4"]
        one.close()
        receiver.port.close()

    asyncio.run(main())


def test_a_paused_port_holds_the_sender_back():
    async def main() -> None:
        one, other = make_pair()
        sender, receiver = Collector(one), Collector(other)
        receiver.port.pause()
        sender.port.send_frame(FrameKind.PAGES, bytes(LARGE_BYTES))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await sender.port.drain()
        receiver.port.resume()
        await sender.port.drain()
        await receiver.until(1)
        sender.port.close()
        receiver.port.close()

    asyncio.run(main())


def test_the_end_is_told_once_and_after_the_frames_before_it_also_across_a_pause():
    async def main() -> None:
        one, other = make_pair()
        receiver = Collector(other)
        receiver.pause_after = 1
        one.sendall(b"".join(encode_frame(FrameKind.PAGES, b"%d" % number) for number in range(3)))
        one.close()
        await receiver.until(1)
        await asyncio.sleep(0.02)
        assert (len(receiver.frames), receiver.ends) == (1, 0)
        receiver.port.resume()
        await receiver.until(3, ends=1)
        await asyncio.sleep(0)
        assert (payloads(receiver), receiver.ends) == ([b"0", b"1", b"2"], 1)
        with pytest.raises(PortClosedError, match="the engine process is gone"):
            receiver.port.send(base.StreamUp())

    asyncio.run(main())


def test_a_port_that_we_close_tells_no_end():
    async def main() -> None:
        one, other = make_pair()
        receiver = Collector(other)
        receiver.port.close()
        receiver.port.close()
        one.close()
        await asyncio.sleep(0)
        assert receiver.ends == 0

    asyncio.run(main())


def test_what_is_no_frame_ends_the_port():
    async def main() -> None:
        one, other = make_pair()
        receiver = Collector(other)
        one.sendall(encode_frame(FrameKind.PAGES, b"good") + b"\xffgarbage")
        await receiver.until(1, ends=1)
        assert payloads(receiver) == [b"good"]
        one.close()

    asyncio.run(main())


def test_what_is_no_frame_is_named_by_the_blocking_port(ports: tuple[Port, Port]):
    ports[0].socket.sendall(b"\xffgarbage")
    with pytest.raises(PortClosedError, match="the stream process sent what is no frame: unknown frame kind 255"):
        ports[1].receive(5)
