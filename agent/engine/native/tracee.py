"""One traced thread: stopping it, borrowing its registers, giving them back, letting it go."""

from __future__ import annotations

import os
import signal as signals
import struct
from typing import Any

from agent.arch import current
from agent.arch.base import Interruption
from agent.kernel import ptrace, waiting
from agent.kernel.ptrace import Event, Option, WaitStatus
from agent.kernel.types import Pid, Tid
from protocol.errors import TaskGoneError

_ALL_BUT_TRAP = ((1 << 64) - 1) & ~(1 << (signals.SIGTRAP - 1))
DEFAULT_STOP_TIMEOUT_S = 5.0


def default_options() -> Option:
    """System call stops told apart from signals; the seccomp filter out of the way where that is permitted."""
    suspend = Option.SUSPEND_SECCOMP if ptrace.may_suspend_seccomp() else Option.NONE
    return Option.TRACESYSGOOD | suspend


def leader_of(pid: int) -> Tid:
    """The main thread of a process has the process's number."""
    return Tid(pid)


def signal_of(siginfo: bytes) -> int:
    """si_signo"""
    return int(struct.unpack_from("=i", siginfo)[0])


class Tracee:
    """Thread `tid` of process `pid`. All methods run in the OS thread that seized it.

    `saved` holds the thread's own registers (and `saved_mask` its signal mask) from `save` to `restore`: meanwhile its
    registers are ours to borrow, and no signal but SIGTRAP reaches it.
    """

    __slots__ = ("held_stop", "pid", "saved", "saved_mask", "stop_signal", "tid")

    def __init__(self, tid: Tid, pid: Pid) -> None:
        self.tid = tid
        self.pid = pid
        self.saved: Any = None  # arch.base.Registers of this machine
        self.saved_mask = 0
        self.stop_signal = 0  # SIGSTOP and the like: it stood in a job-control stop when we came
        self.held_stop = False  # a SIGSTOP came while we borrowed it: sent again when it gets its registers back

    def __repr__(self) -> str:
        return f"Tracee(tid={self.tid}, pid={self.pid})"

    @property
    def is_leader(self) -> bool:
        return self.tid == leader_of(self.pid)

    def seize(self, options: Option | None = None) -> None:
        """Attach and leave it running. Raises: TaskGoneError. KernelError: EPERM, another traces it."""
        ptrace.seize(self.tid, default_options() if options is None else options)

    def interrupt(self) -> None:
        """Ask for a stop; `wait_stop` waits for it."""
        ptrace.interrupt(self.tid)

    def wait_stop(self, timeout_s: float = DEFAULT_STOP_TIMEOUT_S) -> WaitStatus:
        """Wait until it stands at EVENT_STOP. Signals that come before it are delivered, as they would have been.

        Raises: TaskGoneError: it ended. KernelError: ETIMEDOUT.
        """
        while True:
            status = waiting.wait_for(self.tid, timeout_s)
            if self.accept_stop(status):
                return status

    def accept_stop(self, status: WaitStatus) -> bool:
        """Whether `status` is the stop that `interrupt` asked for; else the thread is sent on towards it."""
        if status.is_gone:
            raise TaskGoneError(f"thread {self.tid} of process {self.pid} ended while it was being stopped")
        if status.event == Event.STOP:
            self.stop_signal = status.signal if status.signal != signals.SIGTRAP else 0
            return True
        ptrace.cont(self.tid, status.signal if status.is_signal_stop else 0)
        return False

    def is_stopped(self) -> bool:
        """Whether it still stands where we stopped it: alive, traced by us, not running."""
        try:
            ptrace.get_event_message(self.tid)
        except TaskGoneError:
            return False
        return True

    def get_registers(self) -> Any:
        regs = current().new_registers()
        ptrace.get_regset_into(self.tid, current().general_note, regs)
        return regs

    def set_registers(self, regs: Any) -> None:
        ptrace.set_regset_from(self.tid, current().general_note, regs)

    def get_xstate(self) -> bytes:
        """Vector and floating point state, in the kernel's layout for this processor."""
        return ptrace.get_regset(self.tid, current().extended_note)

    def set_xstate(self, data: bytes) -> None:
        ptrace.set_regset(self.tid, current().extended_note, data)

    def save(self) -> None:
        """Keep registers and signal mask, and block every signal but SIGTRAP. Nothing when they are kept already."""
        if self.saved is not None:
            return
        self.saved_mask = ptrace.get_sigmask(self.tid)
        self.saved = self.get_registers()
        ptrace.set_sigmask(self.tid, _ALL_BUT_TRAP)

    def restore(self) -> None:
        """Give registers and mask back, so that the thread goes on as if it had never been stopped."""
        if self.saved is None:
            return
        regs, _ = self._without_our_eintr(self.saved, self.saved_mask)
        self.set_registers(regs)
        ptrace.set_sigmask(self.tid, self.saved_mask)
        # A remote call clears TIF_SIGPENDING, and without it the kernel does not look at -ERESTARTSYS in the result
        # register: it would leak to the program. An interrupt sets it again, also for the detach by our own death.
        ptrace.interrupt(self.tid)
        self.saved = None
        if self.held_stop:
            self.held_stop = False
            try:
                os.kill(self.pid, signals.SIGSTOP)
            except ProcessLookupError as error:
                raise TaskGoneError(f"process {self.pid} ended while it was stopped") from error

    def forgive_interruption(self) -> None:
        """For a thread whose registers were not borrowed: undo what our stop did to its system call."""
        if self.saved is not None:
            self.restore()
            return
        regs, kind = self._without_our_eintr(self.get_registers(), None)
        if kind is not Interruption.NONE:
            self.set_registers(regs)

    def _without_our_eintr(self, regs: Any, mask: int | None) -> tuple[Any, Interruption]:
        arch = current()
        fixed, kind = arch.hide_interruption(regs, has_pending_signal=False)
        if kind is Interruption.NONE or not self.has_pending_signal(mask):
            return fixed, kind
        return arch.hide_interruption(regs, has_pending_signal=True)

    def has_pending_signal(self, mask: int | None = None) -> bool:
        """Whether a signal waits that `mask` (its own mask by default) lets through."""
        if mask is None:
            mask = self.saved_mask if self.saved is not None else ptrace.get_sigmask(self.tid)
        pending = [*ptrace.peek_siginfo(self.tid, shared=False), *ptrace.peek_siginfo(self.tid, shared=True)]
        return any(not mask >> (signal_of(info) - 1) & 1 for info in pending)

    def detach(self, signal: int = 0) -> None:
        """Let it go on, untraced. Its registers must have been given back."""
        ptrace.detach(self.tid, signal)
