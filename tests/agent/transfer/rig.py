"""Two real stream processes joined over 127.0.0.1, and processes whose memory is moved."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import ipc
from agent.engine import base
from protocol.framing import FrameKind

MIGRATION = "test-0001"
PORTS = list(range(7950, 7999))
TIMEOUT_S = 20.0
ADDRESS = 0x7000_0000_0000 >> 4

_VICTIM = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
address, size, fill = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
got = libc.mmap(address, size, 3, 0x100022, -1, 0)  # MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
assert got == address, (hex(got), ctypes.get_errno())
if fill != "empty":
    step = 1 << 20
    for at in range(0, size, step):
        part = min(step, size - at)
        content = os.urandom(part) if fill == "random" else bytes([65 + at // step % 26]) * part
        ctypes.memmove(address + at, content, part)
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


@dataclass
class Victim:
    """A process with one anonymous area at a known address."""

    process: subprocess.Popen[Any]
    size: int

    @classmethod
    @contextlib.contextmanager
    def start(cls, size: int, fill: str = "empty"):
        process = subprocess.Popen(
            [sys.executable, "-c", _VICTIM, str(ADDRESS), str(size), fill],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield cls(process, size)
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def start_time(self) -> int:
        with Path(f"/proc/{self.pid}/stat").open("rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[19])

    def run(self, line: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"done\n"

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as mem:
            mem.seek(ADDRESS + offset)
            return mem.read(self.size if size is None else size)

    def write(self, offset: int, data: bytes) -> None:
        with Path(f"/proc/{self.pid}/mem").open("r+b", buffering=0) as mem:
            mem.seek(ADDRESS + offset)
            assert mem.write(data) == len(data)

    def resident(self) -> int:
        """Pages of the area that are present."""
        with Path(f"/proc/{self.pid}/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(ADDRESS // 4096 * 8)
            entries = memoryview(pagemap.read(self.size // 4096 * 8)).cast("Q")
            return sum(entry >> 63 for entry in entries)


class StreamProcess:
    """A stream process as its service and its engine see it."""

    def __init__(self, side: str) -> None:
        service, service_end = ipc.make_pair()
        engine, engine_end = ipc.make_pair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agent.transfer.main", "--side", side, "--service-fd", str(service_end.fileno()),
             "--engine-fd", str(engine_end.fileno())],
            pass_fds=[service_end.fileno(), engine_end.fileno()], stderr=subprocess.PIPE,
        )  # fmt: skip
        service_end.close()
        engine_end.close()
        self.service = ipc.Port(service, base.FromStream, "stream")
        self.engine = ipc.Port(engine, base.FromStream | base.StreamToEngine, "stream")
        self.log = ""

    def ask(self, record, fds=()):
        self.service.send(record, fds)
        return self.hear()

    def hear(self):
        return self.service.parse(self.service.receive(TIMEOUT_S))

    def hear_engine(self):
        return self.engine.parse(self.engine.receive(TIMEOUT_S))

    def close(self) -> int:
        self.service.close()
        try:
            self.log = self.process.communicate(timeout=10)[1].decode()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        finally:
            self.engine.close()
        return self.process.returncode


@dataclass
class Pair:
    source: StreamProcess
    target: StreamProcess
    port: int = 0
    host_key: str = ""
    client_key: str = field(default="")

    @classmethod
    @contextlib.contextmanager
    def start(cls):
        pair = cls(StreamProcess("source"), StreamProcess("target"))
        try:
            yield pair
        finally:
            codes = [side.close() for side in (pair.source, pair.target)]
            for side in (pair.source, pair.target):
                assert "Traceback" not in side.log, side.log
        assert codes == [0, 0] or -signal.SIGKILL in codes, codes

    def listen(self, **changes):
        key = self.source.ask(base.StreamMakeKey())
        request: dict[str, Any] = dict(
            address="127.0.0.1", ports=PORTS, client_public_key=key.public_key, peer_address="127.0.0.1",
            migration=MIGRATION, epoch=1,
        )  # fmt: skip
        answer = self.target.ask(base.StreamListen(**request | changes))
        assert isinstance(answer, base.StreamListening), answer
        self.port, self.host_key = answer.port, answer.host_key

    def connect(self, **changes):
        """The source's answer."""
        request: dict[str, Any] = dict(
            address="127.0.0.1", port=self.port, host_key=self.host_key, migration=MIGRATION, epoch=1, compress="none",
            bandwidth=0,
        )  # fmt: skip
        return self.source.ask(base.StreamConnect(**request | changes))

    def join(self, **changes) -> None:
        self.listen()
        answer = self.connect(**changes)
        assert isinstance(answer, base.StreamUp), answer
        assert isinstance(self.target.hear(), base.StreamUp)

    def open(self, giver: Victim, taker: Victim) -> None:
        self.target.engine.send(base.OpenTask(task=1, pid=taker.pid, start_time=taker.start_time))
        # A counter's answer tells nothing of the other port: a section's round trip does.
        self.source.engine.send(base.OpenTask(task=1, pid=giver.pid, start_time=giver.start_time))
        self.source.engine.send_frame(FrameKind.SECTION, b"opened")
        assert self.target.engine.receive(TIMEOUT_S).payload == b"opened"
        self.target.engine.send(base.SectionApplied())

    def copy(self, size: int, *, anonymous: bool = True, final: bool = False, number: int = 1) -> Any:
        self.source.engine.send(base.ReadRuns(task=1, starts=[ADDRESS], sizes=[size], anonymous=anonymous, final=final))
        return self.flush(number)

    def flush(self, number: int = 1):
        self.source.engine.send(base.Flush(number=number))
        return self.source.hear_engine()


def kill(process: subprocess.Popen[Any]) -> None:
    os.kill(process.pid, signal.SIGKILL)


def connection_count(port: int) -> int:
    """Established connections to a port of 127.0.0.1."""
    with Path("/proc/net/tcp").open() as table:
        return sum(
            f"0100007F:{port:04X} " in line.split(": ")[1][:14] and " 01 " in line for line in table if ":" in line
        )
