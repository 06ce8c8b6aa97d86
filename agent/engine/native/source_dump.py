"""The dump of one frozen process, but for its pages and open files.

What can be opened before the freeze is; in it, one batch of calls runs in each thread at the same time, and the
thread has its own registers back before anything else is done.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from agent.arch import current
from agent.engine.native import sections
from agent.engine.native.freeze import FrozenProcess
from agent.engine.native.injection import Injection, scratch_bytes
from agent.engine.native.remote import RemoteSyscalls, find_syscall_instruction
from agent.engine.native.tasks import credentials, process, registers, rseq, scheduling, signals, threads, timers
from agent.engine.native.tasks.plan import Later
from agent.engine.native.tasks.procfile import ProcFile
from agent.engine.native.tracee import Tracee
from agent.kernel import memory, procfs, ptrace
from protocol.errors import KernelError, TaskGoneError, UnsupportedError


@dataclass(slots=True)
class _Thread:
    """One thread while it is dumped."""

    tracee: Tracee
    status: procfs.TaskStatus
    rseq: rseq.Rseq
    registers: registers.Registers
    pending: signals.PendingSignals
    attributes: Later[threads.ThreadAttributes] | None = None
    credentials: Later[credentials.Credentials] | None = None


class TaskDump:
    """Opened before the freeze; `start`, `finish`, `state` in it."""

    def __init__(self, pid: int, task: int) -> None:
        self._pid = pid
        self._task = task
        self._statuses: dict[int, ProcFile] = {}
        self._numbers: list[int] = []
        self._process_files = process.ProcessFiles(pid)
        self._children: dict[int, ProcFile] = {}
        self._threads: list[_Thread] = []
        self._remote: RemoteSyscalls | None = None
        self._injection: Injection | None = None
        self._attributes: Later[process.ProcessAttributes]
        self._actions: Later[signals.SignalActions]
        self._timers: Later[timers.IntervalTimers]
        self._syscall_address = find_syscall_instruction(pid)
        for tid in procfs.task_ids(pid):
            try:
                self._open(tid)
            except TaskGoneError:
                continue

    def _open(self, tid: int) -> procfs.TaskStatus:
        if tid not in self._statuses:
            self._statuses[tid] = ProcFile(f"/proc/{self._pid}/task/{tid}/status")
            self._children[tid] = ProcFile(f"/proc/{self._pid}/task/{tid}/children")
        return procfs.parse_status(self._statuses[tid].read())

    def close(self) -> None:
        """Idempotent."""
        for file in (*self._statuses.values(), *self._children.values()):
            file.close()
        self._process_files.close()

    def threads_section(self) -> sections.ThreadsSection:
        """The threads as they are now, for the target to make before the freeze."""
        numbers = []
        for tid in procfs.task_ids(self._pid):
            try:
                numbers.append((tid != self._pid, self._open(tid).ns_pid[-1]))
            except TaskGoneError:
                continue
        self._numbers = [number for _, number in sorted(numbers)]
        return sections.ThreadsSection(task=self._task, tids=self._numbers)

    # ------------------------------------------------------------ in the freeze

    def start(self, frozen: FrozenProcess, areas: Sequence[procfs.MemoryArea]) -> None:
        """Take what can be taken from outside, and set every thread going on its questions.

        `areas`: as they are in the freeze.
        Raises: UnsupportedError: something has appeared since `check` that cannot be carried.
        """
        for tracee in frozen.threads:
            tracee.save()
            area = _rseq_of(tracee)
            status = self._open(tracee.tid)
            if self._children[tracee.tid].read():
                raise UnsupportedError("the container has started another process", code="process-tree")
            self._threads.append(
                _Thread(
                    tracee=tracee, status=status, rseq=area, registers=registers.dump(tracee),
                    pending=_pending_of(tracee, status),
                )
            )  # fmt: skip
        if timers.count_posix_timers(self._process_files.timers.read()):
            raise UnsupportedError("the container has started a POSIX timer", code="posix-timers")
        leader, *others = self._threads
        self._remote = RemoteSyscalls(leader.tracee, syscall_address=self._syscall_address)
        self._remote.map_scratch(size_bytes=scratch_bytes(len(others)), here=areas)
        self._injection = Injection(self._remote, [thread.tracee for thread in others])
        leader_plan, other_plans = self._injection.plan()
        for thread, plan in zip(self._threads, (leader_plan, *other_plans), strict=True):
            name = threads.unescape_name(thread.status.name)
            thread.attributes = threads.dump(thread.tracee.tid, name, plan)
            thread.credentials = credentials.dump(thread.status, plan)
        self._attributes = process.dump(self._process_files, leader.status, leader_plan)
        self._actions = signals.dump_actions(
            leader_plan, trap_is_ignored=bool(leader.status.sig_ignored >> (signal.SIGTRAP - 1) & 1)
        )
        self._timers = timers.dump(leader_plan)
        self._injection.start(leader_plan, other_plans)

    def finish(self) -> None:
        """Wait for the answers and give every thread its own registers back."""
        assert self._injection is not None
        assert self._remote is not None
        self._injection.finish()
        self._remote.unmap_scratch()
        for thread in self._threads:
            thread.tracee.restore()
        self._remote = None

    def state(self) -> sections.StateSection:
        """All of it."""
        return sections.StateSection(
            task=self._task, attributes=self._attributes(), actions=self._actions(), timers=self._timers(),
            threads=[_state_of(thread) for thread in self._threads],
        )  # fmt: skip

    def threads_changed(self) -> list[sections.Section]:
        """The threads again, if they are not those that the target was told of."""
        numbers = [thread.status.ns_pid[-1] for thread in self._threads]
        if numbers == self._numbers:
            return []
        return [sections.ThreadsSection(task=self._task, tids=numbers, in_freeze=True)]

    def undo(self) -> None:
        """After an error: no thread may run on in our scratch. `FrozenProcess.thaw` gives the registers back."""
        remote, self._remote = self._remote, None
        if remote is not None:
            if self._injection is not None:
                with contextlib.suppress(KernelError):
                    self._injection.finish()
            remote.unmap_scratch()


def _state_of(thread: _Thread) -> sections.ThreadState:
    assert thread.attributes is not None
    assert thread.credentials is not None
    return sections.ThreadState(
        tid=thread.status.ns_pid[-1], registers=thread.registers, attributes=thread.attributes(),
        credentials=thread.credentials(), rseq=thread.rseq, pending=thread.pending,
        scheduling=scheduling.dump(thread.tracee.tid),
    )  # fmt: skip


def _rseq_of(tracee: Tracee) -> rseq.Rseq:
    """The registration; a thread inside a critical section is put to its abort handler first."""
    found = ptrace.get_rseq_configuration(tracee.tid)
    record = rseq.Rseq(address=found.address, size_bytes=found.size_bytes, signature=found.signature, flags=found.flags)
    if record.address:
        pointer = int.from_bytes(memory.process_vm_read(tracee.tid, rseq.pointer_address(record), 8), "little")
        if pointer:
            section = memory.process_vm_read(tracee.tid, pointer, rseq.SECTION_BYTES)
            target = rseq.abort_address(section, tracee.saved.program_counter)
            if target is not None:
                tracee.saved = current().jump(tracee.saved, target)
    return record


def _pending_of(tracee: Tracee, status: procfs.TaskStatus) -> signals.PendingSignals:
    is_leader = int(tracee.tid) == tracee.pid
    private = ptrace.peek_siginfo(tracee.tid, shared=False) if status.sig_pending else []
    shared = ptrace.peek_siginfo(tracee.tid, shared=True) if is_leader and status.shared_pending else []
    return signals.PendingSignals(private=tuple(private), shared=tuple(shared))
