"""The steps of the freeze done once before it, on a program of ours that nobody needs.

The first run of any code costs many times the second: types are looked at, caches filled, memory mapped. What is
rehearsed here is what a freeze does first and only there, so it takes 5 to 10 ms less. Nothing depends on it: whatever
goes wrong is logged, and the migration goes on.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec

from agent.engine.native import files, sections
from agent.engine.native.freeze import freeze_process
from agent.engine.native.source_dump import TaskDump
from agent.engine.native.source_layout import SourceLayout
from agent.engine.native.target_restore import FinalRestore
from agent.engine.native.target_task import TargetTask
from agent.engine.native.tasks import rseq
from agent.kernel import procfs
from agent.network.namespaces import inside, open_fresh_namespace
from protocol.errors import MigrateError

_log = logging.getLogger(__name__)

# A start of Python on a loaded host; the migration waits for it no longer.
_START_TIMEOUT_S = 2.0
_FREEZE_TIMEOUT_S = 1.0
# linux/sockios.h, linux/if.h
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_UP = struct.pack("16sH14x", b"lo", _IFF_UP)
# Code is specialised in its first few runs (PEP 659).
_TURNS = 3

# Threads, a listener and a connection to itself, and one each of the common kinds of open files.
_PROGRAM = """
import ctypes, fcntl, os, select, socket, struct, threading, time
libc = ctypes.CDLL(None)
libc.prctl(1, 9)
if libc.unshare(0x40000000):
    raise SystemExit(1)
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sH14x", b"lo", 1))
listener = socket.create_server(("127.0.0.1", 0))
one = socket.create_connection(listener.getsockname())
two = listener.accept()[0]
poll = select.epoll()
poll.register(two, select.EPOLLIN)
ends = os.pipe(), os.eventfd(0), socket.socketpair()
for _ in range(3):
    threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
os.write(1, b"ready")
time.sleep(1e6)
"""


class Rehearsal:
    """The rehearsals of one engine; `close` ends them. Nothing is raised."""

    def __init__(self) -> None:
        self._stage: Stage | None = None
        self._dumped = (b"", b"")

    def start(self) -> None:
        """Start the program; it gets going while the engine does other things."""
        self._try(self._start)

    def _start(self) -> None:
        self._stage = Stage()

    def begin_source(self) -> None:
        """All that is to be done once, as soon as there is time."""
        for _ in range(_TURNS):
            self._try(self._dump)

    def begin_target(self) -> None:
        """All that is to be done once, as soon as there is time."""
        self._try(self._dump)
        for _ in range(_TURNS):
            self._try(self._restore)

    def refresh_source(self) -> None:
        """Once more, just before the freeze: caches forget."""
        self._try(self._dump)

    def refresh_target(self) -> None:
        """Once more, just before the freeze: caches forget."""
        self._try(self._restore)

    def close(self) -> None:
        """End the program; idempotent."""
        stage, self._stage = self._stage, None
        if stage is not None:
            stage.close()

    def _dump(self) -> None:
        if self._stage is not None:
            self._dumped = self._stage.dump()

    def _restore(self) -> None:
        if self._stage is not None:
            self._stage.restore(*self._dumped)

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with our own program, the migration can do without
            _log.info("no rehearsal, the freeze may take longer: %s: %s", type(error).__name__, error)
            self.close()


class Stage:
    """The program; it dies with this thread, at the latest. Raises (all methods): MigrateError, OSError."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._is_ready = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """End the program; idempotent."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    @property
    def pid(self) -> int:
        """Of the program, once it has begun."""
        if not self._is_ready:
            assert self._process.stdout is not None
            ready, _, _ = select.select([self._process.stdout], [], [], _START_TIMEOUT_S)
            if not ready or not os.read(self._process.stdout.fileno(), 16):
                raise MigrateError("the program for the rehearsal did not start", code="rehearsal")
            self._is_ready = True
        return self._process.pid

    def dump(self) -> tuple[bytes, bytes]:
        """What the source does in the freeze; gives the sections of the state and of the files."""
        pid = self.pid
        layout = SourceLayout(pid, 0)
        layout.look()
        dump = TaskDump(pid, 0)
        dump.threads_section()
        prepared = files.PreparedDump.prepare(pid)
        frozen = freeze_process(pid, _FREEZE_TIMEOUT_S)
        try:
            layout.look(in_freeze=True)
            dump.start(frozen, layout.lines)
            dump.finish()
            dump.threads_changed()
            layout.changed()
            layout.finished()
            state = sections.encode(dump.state())
            dumped = sections.encode(sections.FilesStateSection(task=0, files=prepared.dump()))
            frozen.still_frozen()
        finally:
            prepared.undo()
            dump.undo()
            frozen.thaw()
            prepared.close()
            dump.close()
            layout.close()
        return state, dumped

    def restore(self, state: bytes, dumped: bytes) -> None:
        """What the target does in the freeze, of `dump`'s sections, to the same program; it goes on as it was.

        But for its sockets, which lie in another network namespace from then on: no more `dump`.
        """
        state_section, files_section = sections.decode(state), sections.decode(dumped)
        assert isinstance(state_section, sections.StateSection)
        assert isinstance(files_section, sections.FilesStateSection)
        # Already registered, which the kernel refuses to do twice.
        nothing = rseq.Rseq(address=0, size_bytes=0, signature=0, flags=0)
        threads = [msgspec.structs.replace(thread, rseq=nothing) for thread in state_section.threads]
        network = _fresh_network()
        frozen = freeze_process(self.pid, _FREEZE_TIMEOUT_S)
        try:
            task = TargetTask(0, frozen.leader)
            task.others = {procfs.read_namespace_pids(t.tid)[-1]: t for t in frozen.threads if not t.is_leader}
            task.remote.map_scratch()
            final = FinalRestore(task)
            final.apply_state(msgspec.structs.replace(state_section, threads=threads))
            final.apply_files(files_section, f"/proc/self/fd/{network}")
            final.complete(None)
        finally:
            os.close(network)
            if any(tracee.is_stopped() for tracee in frozen.tracees.values()):
                # In the middle of a restore: it must not run on with half of it.
                self._process.kill()


def _fresh_network() -> int:
    """A network namespace with its loopback up, as a descriptor: the program's own addresses are taken in its own."""
    network = open_fresh_namespace()
    with inside(network), socket.socket() as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, _UP)
    return network
