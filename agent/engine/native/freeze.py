"""Stopping every thread of processes at once, and letting them go on as if nothing had been."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from agent.engine.native.tracee import Tracee, leader_of
from agent.kernel import procfs, ptrace, waiting
from agent.kernel.ptrace import Option
from agent.kernel.types import Pid, Tid
from protocol.errors import KernelError, MigrateError, TaskGoneError, UnsupportedError

# A thread that waits for its vfork child does not stop, and cannot be let go either, until the child has gone on.
RELEASE_TIMEOUT_S = 5.0


@dataclass(slots=True)
class FrozenProcess:
    """All threads of `pid`, stopped by us. `thaw` may be called at any time, more than once."""

    pid: Pid
    tracees: dict[Tid, Tracee] = field(default_factory=dict)

    @property
    def leader(self) -> Tracee:
        return self.tracees[leader_of(self.pid)]

    @property
    def threads(self) -> list[Tracee]:
        """The leader first, then by number."""
        return sorted(self.tracees.values(), key=lambda t: (not t.is_leader, t.tid))

    def still_frozen(self) -> bool:
        """Whether it is the same stop, unbroken: every thread stands, and there is no thread that we did not stop."""
        try:
            names = os.listdir(f"/proc/{self.pid}/task")
        except FileNotFoundError:
            return False
        return {int(name) for name in names} == set(self.tracees) and all(t.is_stopped() for t in self.tracees.values())

    def thaw(self) -> None:
        """Give every thread its registers back and let it go, the leader last.

        Threads that died meanwhile are passed over. Raises: KernelError: the first failure, after all were tried.
        """
        _release(self.threads[::-1])
        self.tracees.clear()


def freeze_process(pid: int, timeout_s: float = 2.0, options: Option | None = None) -> FrozenProcess:
    """As `freeze_processes`, for one."""
    return freeze_processes([pid], timeout_s, options)[0]


def freeze_processes(
    pids: Sequence[int], timeout_s: float = 2.0, options: Option | None = None
) -> list[FrozenProcess]:  # fmt: skip
    """Stop every thread of all `pids`: all are asked, then all are waited for, until no new thread turns up.

    New *processes* are the caller's matter: look at the tree again when this returns.
    Raises: KernelError: ETIMEDOUT, naming the thread that did not stop. UnsupportedError: another traces a thread.
    TaskGoneError: a process is dead. Whatever is raised, nothing is left stopped.
    """
    deadline = time.monotonic() + timeout_s
    frozen = [FrozenProcess(Pid(pid)) for pid in pids]
    waited: set[Tid] = set()
    try:
        while asked := [t for process in frozen for t in _seize_new(process, options)]:
            for tracee in asked:
                if _wait(tracee, deadline):
                    waited.add(tracee.tid)
                else:
                    del frozen[[p.pid for p in frozen].index(tracee.pid)].tracees[tracee.tid]
        for process in frozen:
            if not process.tracees:
                raise TaskGoneError(f"process {process.pid} ended while it was being stopped")
    except BaseException:
        _undo(frozen, waited)
        raise
    return frozen


def _seize_new(process: FrozenProcess, options: Option | None) -> list[Tracee]:
    new: list[Tracee] = []
    for tid in procfs.task_ids(process.pid):
        if tid in process.tracees:
            continue
        tracee = Tracee(tid, process.pid)
        try:
            tracee.seize(options)
            process.tracees[tid] = tracee
            tracee.interrupt()
        except TaskGoneError:
            process.tracees.pop(tid, None)
            continue
        except KernelError as error:
            if error.errno == errno.EPERM:
                _explain_refusal(tracee, error)
                continue
            raise
        new.append(tracee)
    return new


def _explain_refusal(tracee: Tracee, error: KernelError) -> None:
    """A thread that may not be traced: fine for one that is just ending, else an error that says why."""
    try:
        status = procfs.read_status(tracee.pid, tracee.tid)
    except TaskGoneError:
        return
    if status.state in {"Z", "X"} and not tracee.is_leader:
        return
    if status.state in {"Z", "X"}:
        raise UnsupportedError(
            f"the main thread of process {tracee.pid} has ended (state {status.state})", code="leader-gone"
        ) from error
    if status.tracer_pid:
        try:
            name = os.fsdecode(procfs.read_comm(status.tracer_pid))
        except TaskGoneError:
            name = "gone"
        raise UnsupportedError(
            f"thread {tracee.tid} of process {tracee.pid} is traced by process {status.tracer_pid} ({name})",
            code="traced",
            hint="end the debugger or tracer and try again",
        ) from error
    raise error


def _wait(tracee: Tracee, deadline: float) -> bool:
    """False: the thread ended. Raises: KernelError: ETIMEDOUT."""
    try:
        while True:
            status = waiting.wait_for(tracee.tid, max(0.0, deadline - time.monotonic()))
            if tracee.accept_stop(status):
                return True
    except TaskGoneError:
        return False
    except KernelError as error:
        if error.errno == errno.ETIMEDOUT:
            raise KernelError(f"stop process {tracee.pid}", errno.ETIMEDOUT, _why_running(tracee)) from error
        raise


def _why_running(tracee: Tracee) -> str:
    state = procfs.read_status(tracee.pid, tracee.tid).state
    children = procfs.read_proc(f"/proc/{tracee.pid}/task/{tracee.tid}/children").split()
    if state == "D" and children:
        return f"thread {tracee.tid} does not stop: it waits for its vfork child {int(children[-1])}"
    return f"thread {tracee.tid} does not stop (state {state})"


def _undo(frozen: Iterable[FrozenProcess], waited: set[Tid]) -> None:
    """First let go of those that stand; that is what those still running may wait for."""
    tracees = [t for process in frozen for t in process.threads[::-1]]
    _release([t for t in tracees if t.tid in waited])
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    late = [t for t in tracees if t.tid not in waited and _wait(t, deadline)]
    _release(late)
    for process in frozen:
        process.tracees.clear()


def _release(tracees: Iterable[Tracee]) -> None:
    first_error: MigrateError | None = None
    for tracee in tracees:
        try:
            tracee.forgive_interruption()
            tracee.detach()
        except TaskGoneError:
            # Dead (killed while it stood): take the report, so that it can be reaped.
            _reap(tracee)
        except KernelError as error:
            first_error = first_error or error
    if first_error is not None:
        raise first_error


def _reap(tracee: Tracee) -> None:
    try:
        ptrace.wait(tracee.tid, nohang=True)
    except TaskGoneError:
        return
