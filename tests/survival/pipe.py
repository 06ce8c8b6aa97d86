"""The two streams of a migration in one thread: sections pass, pages are read here and written there."""

from __future__ import annotations

import errno
import os
import threading

from agent.engine import base
from agent.ipc import Port, PortClosedError
from agent.kernel.memory import process_vm_writev
from protocol.framing import FrameKind

_PIECE_BYTES = 1 << 20
_PAGE_BYTES = 4096


class StreamPipe(threading.Thread):
    """Joins the stream sockets of a source's and a target's engine."""

    def __init__(self, source: Port, target: Port) -> None:
        super().__init__(daemon=True)
        self._source = source
        self._target = target
        self._memory: dict[int, int] = {}
        self._pids: dict[int, int] = {}
        self.sections = 0
        self.page_bytes = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while True:
                frame = self._source.receive()
                if frame.kind is FrameKind.SECTION:
                    self.sections += 1
                    self._target.send_frame(FrameKind.SECTION, frame.payload)
                    self._await_applied()
                else:
                    self._obey(self._source.parse(frame))
        except PortClosedError:
            pass
        except BaseException as error:  # shown by the test that waits for the engines
            self.error = error
        finally:
            self._source.close()
            self._target.close()
            for memory in self._memory.values():
                os.close(memory)

    def _await_applied(self) -> None:
        while True:
            record = self._target.parse(self._target.receive())
            match record:
                case base.SectionApplied():
                    return
                case base.OpenTask():
                    self._pids[record.task] = record.pid
                case base.ReleasePackets() | base.Urgent():
                    pass
                case _:
                    raise AssertionError(record)

    def _obey(self, record: object) -> None:
        match record:
            case base.OpenTask():
                self._memory[record.task] = os.open(f"/proc/{record.pid}/mem", os.O_RDONLY)
            case base.ReadRuns():
                for start, size in zip(record.starts, record.sizes, strict=True):
                    for offset in range(0, size, _PIECE_BYTES):
                        self._copy(record.task, start + offset, min(_PIECE_BYTES, size - offset))
            case base.Flush():
                flushed = base.Flushed(
                    number=record.number, read_bytes=self.page_bytes, zero_bytes=0, wire_bytes=0, ms=0.0
                )
                self._source.send(flushed)
            case base.Urgent() | base.ForwardPackets():
                pass
            case _:
                raise AssertionError(record)

    def _copy(self, task: int, address: int, size_bytes: int) -> None:
        try:
            data = os.pread(self._memory[task], size_bytes, address)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            data = b""
        if data:
            process_vm_writev(self._pids[task], [(address, len(data))], data)
            self.page_bytes += len(data)
        if len(data) < size_bytes:
            # Unmapped since the scan: the next layout will say so. The process runs, but for the last time.
            skipped = len(data) + _PAGE_BYTES
            if skipped < size_bytes:
                self._copy(task, address + skipped, size_bytes - skipped)
