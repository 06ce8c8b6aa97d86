"""Load for a redis over ONE TCP connection: an open loop, every reply checked, every acknowledged write read back.

Runs on a client host; standard library only. It prints `ready` when the memory is filled, takes commands on stdin
(`report`: figures since the last report; `stop`, as SIGTERM: the end, with all that was acknowledged read back) and
answers each with a JSON line. Its status is 1 if a reply was wrong or late beyond 30 s, the connection broke, or an
acknowledged write was lost.

A request is due each period whether or not the one before was answered, and its latency counts from when it was due:
so a stall shows in full, as it would to many independent users.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

_POOL_BYTES = 1 << 22  # random bytes that values are cut from
_LOAD_KEYS = 1000
_REPLY_TIMEOUT_S = 30.0
_LATE_S = 0.002  # a request that waited longer belongs to a gap
_PIPELINED_BYTES = 1 << 20  # on their way while filling and reading back
_DIRTY_PERIOD_S = 0.01
_OK = b"+OK\r\n"


class BrokenPromiseError(Exception):
    """redis, or the way to it, did something that a client may not see."""


def command(*words: bytes) -> bytes:
    """A request in redis' protocol (RESP)."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def bulk(value: bytes) -> bytes:
    """A reply that is a value."""
    return b"$%d\r\n%s\r\n" % (len(value), value)


class Values:
    """The value that belongs to a key and a version: computed, not remembered."""

    def __init__(self, size_bytes: int, *, compressible: bool) -> None:
        self._size_bytes = size_bytes
        self._pool = b"redis load " * (_POOL_BYTES // 11) if compressible else os.urandom(_POOL_BYTES)

    def value(self, key: bytes, number: int, version: int = 0) -> bytes:
        head = b"%s=%d " % (key, version)
        offset = (number * 7919 + version * 104729) % (len(self._pool) - self._size_bytes)
        return head + self._pool[offset : offset + self._size_bytes - len(head)]

    def items(self, keys: list[bytes], versions: list[int] | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Each key with its value, made when it is asked for: a GiB need not be here too."""
        return ((key, self.value(key, n, versions[n] if versions else 0)) for n, key in enumerate(keys))


class Connection:
    """Requests go out, replies are compared with what they must be, in order."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=_REPLY_TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.local_port = self.socket.getsockname()[1]
        self.due_and_replies: collections.deque[tuple[float, bytes]] = collections.deque()
        self.sent_bytes = 0
        self.replies = 0
        self.last_reply_at = time.monotonic()
        self._out = bytearray()
        self._in = bytearray()

    def request(self, request: bytes, reply: bytes, due: float) -> None:
        if not self.due_and_replies:
            self.last_reply_at = time.monotonic()
        self.due_and_replies.append((due, reply))
        self._out += request
        self.flush()

    def flush(self) -> None:
        while self._out:
            try:
                sent = self.socket.send(memoryview(self._out)[: 1 << 18])
            except BlockingIOError:
                return
            self.sent_bytes += sent
            del self._out[:sent]

    def wait(self, timeout_s: float, other: list[int]) -> list[int]:
        """Wait for the socket or one of the `other` files, at most `timeout_s`; returns which are readable."""
        own = self.socket.fileno()
        readable, writable, _ = select.select([own, *other], [own] if self._out else [], [], max(0.0, timeout_s))
        if writable:
            self.flush()
        return readable

    def receive(self) -> list[tuple[float, float]]:
        """Read and check what is there: (due, latency in seconds) of each reply. Raises: BrokenPromiseError."""
        try:
            data = self.socket.recv(1 << 20)
        except BlockingIOError:
            data = None
        now = time.monotonic()
        if data == b"":
            raise BrokenPromiseError("the connection was closed")
        if data is None:
            if self.due_and_replies and now - self.last_reply_at > _REPLY_TIMEOUT_S:
                raise BrokenPromiseError(f"{len(self.due_and_replies)} requests were not answered")
            return []
        self._in += data
        answered = []
        start = 0
        while self.due_and_replies and start < len(self._in):
            due, reply = self.due_and_replies[0]
            got = self._in[start : start + len(reply)]
            if not reply.startswith(got):
                raise BrokenPromiseError(f"wrong reply {bytes(got[:100])!r}, expected {reply[:100]!r}")
            if len(got) < len(reply):
                break
            self.due_and_replies.popleft()
            start += len(reply)
            answered.append((due, now - due))
        del self._in[:start]
        if self._in and not self.due_and_replies:
            raise BrokenPromiseError(f"a reply that nobody asked for: {bytes(self._in[:100])!r}")
        self.replies += len(answered)
        self.last_reply_at = now
        return answered

    def drain(self, at_most: int = 0) -> None:
        """Wait until at most that many requests are unanswered."""
        while len(self.due_and_replies) > at_most:
            self.wait(0.1, [])
            self.receive()

    def set_and_check(self, items: Iterable[tuple[bytes, bytes]], *, value_bytes: int, read_back: bool) -> None:
        """SET all items, or GET and compare them, pipelined."""
        deep = max(1, min(1000, _PIPELINED_BYTES // (value_bytes + 64)))
        for key, value in items:
            if read_back:
                self.request(command(b"GET", key), bulk(value), time.monotonic())
            else:
                self.request(command(b"SET", key, value), _OK, time.monotonic())
            self.drain(at_most=deep)
        self.drain()


class Figures:
    """What the open loop saw since the last report."""

    def __init__(self) -> None:
        self._latencies: list[float] = []
        self._gaps: list[dict[str, float]] = []
        self._in_gap = False
        self._late_send_s = 0.0
        self._began = time.monotonic()

    def add(self, due: float, latency_s: float) -> None:
        self._latencies.append(latency_s)
        if latency_s <= _LATE_S:
            self._in_gap = False
            return
        if not self._in_gap:
            self._gaps.append({"at_monotonic_s": due, "ms": 0.0, "requests": 0})
        self._in_gap = True
        gap = self._gaps[-1]
        gap["ms"] = max(gap["ms"], latency_s * 1e3)
        gap["requests"] += 1

    def sent_late(self, late_s: float) -> None:
        self._late_send_s = max(self._late_send_s, late_s)

    def as_dict(self) -> dict[str, object]:
        ordered = sorted(self._latencies) or [0.0]
        parts = {name: ordered[int(len(ordered) * part)] * 1e3 for name, part in [("p50_ms", 0.5), ("p99_ms", 0.99)]}
        return {
            "seconds": time.monotonic() - self._began,
            "replies": len(self._latencies),
            "max_gap_ms": ordered[-1] * 1e3,
            **parts,
            "late_send_ms": self._late_send_s * 1e3,  # our own delay: how far max_gap_ms can be trusted
            "gaps": self._gaps,
        }


class Commands:
    """Lines on stdin, and SIGTERM."""

    def __init__(self) -> None:
        self.files = [0]
        self.stop = False
        self._line = b""
        signal.signal(signal.SIGTERM, self._on_term)

    def _on_term(self, *_: object) -> None:
        self.stop = True

    def read(self) -> list[str]:
        data = os.read(0, 4096)
        if not data:
            self.files = []
            return []
        *lines, self._line = (self._line + data).split(b"\n")
        commands = [line.decode().strip() for line in lines]
        self.stop = self.stop or "stop" in commands
        return commands


def open_loop(connection: Connection, commands: Commands, period_s: float, written: dict[bytes, bytes]) -> Figures:
    """SET and GET in turn until told to stop. `written` gets what was acknowledged or is on its way."""
    figures = Figures()
    number = 0
    due = time.monotonic() + period_s
    while not commands.stop:
        readable = connection.wait(due - time.monotonic(), commands.files)
        for answered in connection.receive():
            figures.add(*answered)
        now = time.monotonic()
        while due <= now:
            key = b"load:%d" % (number // 2 % _LOAD_KEYS)
            if number % 2:
                connection.request(command(b"GET", key), bulk(written[key]), due)
            else:
                written[key] = b"%d of %s" % (number, key)
                connection.request(command(b"SET", key, written[key]), _OK, due)
            figures.sent_late(time.monotonic() - due)
            number += 1
            due += period_s
        if 0 in readable and "report" in commands.read():
            say({**figures.as_dict(), "local_port": connection.local_port})
            figures = Figures()
    while connection.due_and_replies:
        connection.wait(0.1, [])
        for answered in connection.receive():
            figures.add(*answered)
    return figures


def say(answer: dict[str, object]) -> None:
    print(json.dumps(answer), flush=True)


def load(arguments: argparse.Namespace) -> dict[str, object]:
    connection = Connection(arguments.address)
    values = Values(arguments.value_bytes, compressible=arguments.compressible)
    keys = [b"fill:%d" % n for n in range((arguments.prefill_mb << 20) // arguments.value_bytes)]
    connection.set_and_check(values.items(keys), value_bytes=arguments.value_bytes, read_back=False)
    dirtier = start_dirtier() if arguments.dirty_mb_per_s else None
    gc.collect()
    gc.freeze()
    gc.disable()
    print("ready", flush=True)
    written: dict[bytes, bytes] = {}
    figures = open_loop(connection, Commands(), arguments.period_ms / 1e3, written)
    dirtied = stop_dirtier(dirtier) if dirtier else {}
    connection.set_and_check(written.items(), value_bytes=64, read_back=True)
    connection.set_and_check(values.items(keys), value_bytes=arguments.value_bytes, read_back=True)
    return {
        **figures.as_dict(),
        "local_port": connection.local_port,
        "prefilled_bytes": len(keys) * arguments.value_bytes,
        "keys_read_back": len(keys) + len(written),
        "dirtied": dirtied,
    }


def start_dirtier() -> subprocess.Popen[str]:
    """A second connection, in a process of its own so that it does not disturb the clock of the first."""
    child = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--only-dirty"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    if child.stdout.readline() != "ready\n":
        raise BrokenPromiseError("the writer of the dirty pages did not get going")
    return child


def stop_dirtier(child: subprocess.Popen[str]) -> dict[str, object]:
    answer: dict[str, object] = json.loads(child.communicate("stop\n")[0])
    if child.returncode != 0:
        raise BrokenPromiseError(f"the writer of the dirty pages: {answer['error']}")
    return answer


def dirty(arguments: argparse.Namespace) -> dict[str, object]:
    """Overwrite `dirty_set_mb` of values, round and round, at `dirty_mb_per_s`."""
    connection = Connection(arguments.address)
    size_bytes = arguments.dirty_value_bytes
    values = Values(size_bytes, compressible=arguments.compressible)
    keys = [b"dirty:%d" % n for n in range((arguments.dirty_set_mb << 20) // size_bytes)]
    versions = [0] * len(keys)
    connection.set_and_check(values.items(keys), value_bytes=size_bytes, read_back=False)
    print("ready", flush=True)
    commands = Commands()
    began = due = time.monotonic()
    written_bytes = 0
    cursor = 0
    while not commands.stop:
        readable = connection.wait(due - time.monotonic(), commands.files)
        connection.receive()
        if 0 in readable:
            commands.read()
        now = time.monotonic()
        # One second's worth may wait for replies: it dirties pages, it does not measure.
        behind = len(connection.due_and_replies) * size_bytes > arguments.dirty_mb_per_s << 20
        while written_bytes < (now - began) * (arguments.dirty_mb_per_s << 20) and not behind:
            versions[cursor] += 1
            value = values.value(keys[cursor], cursor, versions[cursor])
            connection.request(command(b"SET", keys[cursor], value), _OK, now)
            written_bytes += size_bytes
            cursor = (cursor + 1) % len(keys)
        due = now + _DIRTY_PERIOD_S
    connection.drain()
    seconds = time.monotonic() - began
    connection.set_and_check(values.items(keys, versions), value_bytes=size_bytes, read_back=True)
    return {"bytes": written_bytes, "mb_per_s": written_bytes / seconds / (1 << 20), "keys_read_back": len(keys)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", type=lambda text: (text.split(":")[0], int(text.split(":")[1])))
    parser.add_argument("--prefill-mb", type=int, default=0)
    parser.add_argument("--value-bytes", type=int, default=4096)
    parser.add_argument("--compressible", action="store_true")
    parser.add_argument("--period-ms", type=float, default=1.0)
    parser.add_argument("--dirty-mb-per-s", type=int, default=0)
    parser.add_argument("--dirty-set-mb", type=int, default=32)
    parser.add_argument("--dirty-value-bytes", type=int, default=16384)
    parser.add_argument("--only-dirty", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        say((dirty if arguments.only_dirty else load)(arguments))
    except (BrokenPromiseError, OSError) as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
