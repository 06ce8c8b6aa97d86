"""Descriptors that name a process, for good. Source: pidfd_open(2), pidfd_getfd(2), pidfd_send_signal(2)."""

from __future__ import annotations

from agent.kernel.syscalls import syscall
from agent.kernel.types import Fd
from agent.kernel.unistd import SYS

# linux/pidfd.h
PIDFD_NONBLOCK = 0o4000
PIDFD_THREAD = 0o200  # Linux 6.9: any thread, not only leaders


def pidfd_open(pid: int, flags: int = 0) -> Fd:
    """Readable (poll) when the process has ended. Raises: TaskGoneError, KernelError."""
    return Fd(syscall(SYS.pidfd_open, pid, flags, name=f"pidfd_open({pid})"))


def pidfd_getfd(pidfd: int, number: int) -> Fd:
    """A duplicate, in this process, of descriptor `number` of that one. Raises: KernelError (EBADF), TaskGoneError."""
    return Fd(syscall(SYS.pidfd_getfd, pidfd, number, 0, name=f"pidfd_getfd(descriptor {number})"))


def pidfd_send_signal(pidfd: int, signal: int) -> None:
    """Raises: TaskGoneError: it has ended. KernelError."""
    syscall(SYS.pidfd_send_signal, pidfd, signal, None, 0, name=f"pidfd_send_signal(signal {signal})")
