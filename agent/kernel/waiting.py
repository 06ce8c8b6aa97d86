"""Waiting for a traced thread with a time limit: waitpid has none, SIGCHLD and sigtimedwait do."""

from __future__ import annotations

import contextlib
import errno
import signal
import time
from collections.abc import Iterator

from agent.kernel import ptrace
from agent.kernel.types import Tid
from protocol.errors import KernelError

_SIGCHLD = {signal.SIGCHLD}
# SIGCHLD may go to another thread of ours that does not block it: look again after this long at the latest.
_LOOK_AGAIN_S = 0.002
# A stop mostly comes within a few microseconds: asking at once is cheaper than sleeping.
_QUICK_LOOKS = 8


@contextlib.contextmanager
def child_signals() -> Iterator[None]:
    """Block SIGCHLD in this thread, so that `pause` can wait for it without losing one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGCHLD)
    try:
        yield
    finally:
        if signal.SIGCHLD not in before:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pause(timeout_s: float) -> None:
    """Inside `child_signals`: return when some child or tracee has changed, or after 2 ms, or after `timeout_s`."""
    signal.sigtimedwait(_SIGCHLD, max(0.0, min(timeout_s, _LOOK_AGAIN_S)))


def wait_for(tid: Tid, timeout_s: float) -> ptrace.WaitStatus:
    """The next report of `tid`.

    Raises: KernelError: ETIMEDOUT, nothing within `timeout_s`. TaskGoneError: not our tracee.
    """
    for _ in range(_QUICK_LOOKS):
        status = ptrace.wait(tid, nohang=True)
        if status.kind is not ptrace.WaitKind.RUNNING:
            return status
    deadline = time.monotonic() + timeout_s
    with child_signals():
        while True:
            status = ptrace.wait(tid, nohang=True)
            if status.kind is not ptrace.WaitKind.RUNNING:
                return status
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise KernelError(f"waitpid({tid})", errno.ETIMEDOUT, f"the thread did not stop within {timeout_s} s")
            pause(left_s)
