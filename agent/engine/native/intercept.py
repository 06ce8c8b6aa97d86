"""Taking over a container's init at its exec.

The runtime has built everything (namespaces, cgroup, mounts, credentials, seccomp) and calls execve as its last act.
The process is stopped there, before the first instruction of the program: it is empty, right in every respect that
the runtime cares for, and ours to fill.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal as signals
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from agent.engine.native.tracee import Tracee, default_options, leader_of
from agent.kernel import pidfd, procfs, ptrace, waiting
from agent.kernel.ptrace import Event, Option, WaitKind, WaitStatus
from agent.kernel.types import Fd, Pid, Tid
from protocol.errors import KernelError, MigrateError, TaskGoneError

_FOLLOW = Option.TRACEEXEC | Option.TRACECLONE | Option.TRACEFORK | Option.TRACEVFORK
_OUTPUT_LIMIT_BYTES = 4096


@dataclass(slots=True)
class InterceptedProcess:
    """`tracee` stands at the exit of its execve; its registers may be set. It dies with us (EXITKILL)."""

    tracee: Tracee
    starter: subprocess.Popen[bytes]
    start_argv: Sequence[str]
    output: IO[bytes]

    def starter_output(self) -> str:
        """What the runtime's start command said, its last 4 KiB."""
        return _tail(self.output)

    def wait_starter(self, timeout_s: float) -> int:
        """The exit status of the runtime's start command, which returns once the exec is done.

        Raises: MigrateError: it does not end.
        """
        try:
            return self.starter.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise MigrateError(
                f"`{' '.join(self.start_argv)}` has not returned after {timeout_s} s: {self.starter_output()}",
                code="start-hangs",
            ) from error


def intercept_exec(
    init_pid: int, start_argv: Sequence[str], timeout_s: float = 10.0, options: Option | None = None
) -> InterceptedProcess:  # fmt: skip
    """Seize all threads of a created container's init, run `start_argv` (`runc start ID`), stop at the exec.

    Raises: MigrateError: the start command failed, with what it said. TaskGoneError: init ended before its exec.
    KernelError: ETIMEDOUT, or EPERM. Whatever is raised, init is killed and the start command ended.
    """
    if options is None:
        options = default_options() | Option.EXITKILL
    with contextlib.ExitStack() as undo:
        init = pidfd.pidfd_open(init_pid)
        undo.callback(os.close, init)
        output = undo.enter_context(tempfile.TemporaryFile())
        pump = _Pump(Pid(init_pid), init, time.monotonic() + timeout_s, output)
        undo.callback(pump.destroy)
        pump.seize_all(options | _FOLLOW)
        pump.start(start_argv)
        pump.run_to_exec()
        tracee = pump.run_to_exec_exit()
        assert pump.starter is not None
        undo.pop_all()
        os.close(init)
        return InterceptedProcess(tracee, pump.starter, start_argv, output)


class _Pump:
    """Passes every stop of init's threads on, until the exec."""

    def __init__(self, pid: Pid, init: Fd, deadline: float, output: IO[bytes]) -> None:
        self.pid = pid
        self.init = init
        self.deadline = deadline
        self.output = output
        self.known: set[Tid] = set()
        self.start_argv: Sequence[str] = ()
        self.starter: subprocess.Popen[bytes] | None = None

    def seize_all(self, options: Option) -> None:
        while new := [tid for tid in procfs.task_ids(self.pid) if tid not in self.known]:
            for tid in new:
                self.known.add(tid)
                try:
                    ptrace.seize(tid, options)
                except TaskGoneError:
                    self.known.discard(tid)

    def start(self, argv: Sequence[str]) -> None:
        self.start_argv = argv
        self.starter = subprocess.Popen(list(argv), stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output)

    def run_to_exec(self) -> None:
        with waiting.child_signals():
            while True:
                progress = False
                for tid in list(self.known):
                    status = self._poll(tid)
                    if status.kind is WaitKind.RUNNING:
                        continue
                    progress = True
                    if self._pass(status):
                        return
                self._check_starter()
                if not progress:
                    left_s = self.deadline - time.monotonic()
                    if left_s <= 0:
                        raise KernelError(
                            f"exec of process {self.pid}", errno.ETIMEDOUT, f"not reached in time: {self._said()}"
                        )
                    waiting.pause(left_s)

    def _poll(self, tid: Tid) -> WaitStatus:
        try:
            return ptrace.wait(tid, nohang=True)
        except TaskGoneError:
            return WaitStatus(tid, WaitKind.EXITED)

    def _pass(self, status: WaitStatus) -> bool:
        """Send the thread on; whether it was the exec."""
        tid = status.tid
        if status.is_gone:
            self.known.discard(tid)
            if tid == leader_of(self.pid):
                raise TaskGoneError(f"container init {self.pid} ended before its exec: {self._said()}")
            return False
        if status.event == Event.EXEC:
            # A thread that execs takes over its leader's number; its own is gone without a report.
            self.known = {tid}
            return True
        with contextlib.suppress(TaskGoneError):  # killed meanwhile: its end is reported next
            if status.event in ptrace.NEW_TASK_EVENTS:
                self.known.add(Tid(ptrace.get_event_message(tid)))
            ptrace.cont(tid, status.signal if status.is_signal_stop else 0)
        return False

    def run_to_exec_exit(self) -> Tracee:
        """At the exec's stop itself the result register is still to be written by execve's return."""
        tid = Tid(self.pid)
        ptrace.syscall_stop(tid)
        while not (status := waiting.wait_for(tid, max(0.0, self.deadline - time.monotonic()))).is_syscall_stop:
            if status.is_gone:
                raise TaskGoneError(f"container init {self.pid} ended at its exec: {self._said()}")
            ptrace.syscall_stop(tid)
        tracee = Tracee(tid, self.pid)
        tracee.save()
        return tracee

    def _check_starter(self) -> None:
        assert self.starter is not None
        code = self.starter.poll()
        if code:
            raise MigrateError(
                f"`{' '.join(self.start_argv)}` failed with status {code}: {self._said()}",
                code="start-failed",
            )

    def _said(self) -> str:
        return _tail(self.output) or "the start command said nothing"

    def destroy(self) -> None:
        """Nothing half-made stays: init is killed and reaped as far as it is ours, the start command ended."""
        with contextlib.suppress(TaskGoneError):
            pidfd.pidfd_send_signal(self.init, signals.SIGKILL)
        deadline = time.monotonic() + 2.0
        with waiting.child_signals():
            while self.known and time.monotonic() < deadline:
                gone = {tid for tid in self.known if self._poll(tid).is_gone}
                self.known -= gone
                if not gone:
                    waiting.pause(0.01)
        if self.starter is not None and self.starter.poll() is None:
            self.starter.kill()
            self.starter.wait()


def _tail(output: IO[bytes]) -> str:
    size = os.fstat(output.fileno()).st_size
    data = os.pread(output.fileno(), _OUTPUT_LIMIT_BYTES, max(0, size - _OUTPUT_LIMIT_BYTES))
    return data.decode("utf-8", "replace").strip()
