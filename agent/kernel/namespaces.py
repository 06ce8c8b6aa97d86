"""Entering and making namespaces, for the calling thread only. Source: setns(2), unshare(2)."""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Iterator

from agent.kernel.syscalls import os_failure, syscall
from agent.kernel.types import Fd
from agent.kernel.unistd import SYS


class Namespace(enum.IntFlag):
    """CLONE_NEW* (linux/sched.h)"""

    TIME = 0x80
    MOUNT = 0x20000
    CGROUP = 0x2000000
    UTS = 0x4000000
    IPC = 0x8000000
    USER = 0x10000000
    PID = 0x20000000
    NET = 0x40000000


def setns(descriptor: int, kind: Namespace) -> None:
    """`descriptor`: a namespace, or a pidfd with several kinds at once. Raises: KernelError."""
    syscall(SYS.setns, descriptor, int(kind), name=f"setns({kind!r})")


def unshare(kinds: Namespace) -> None:
    """Raises: KernelError."""
    syscall(SYS.unshare, int(kinds), name=f"unshare({kinds!r})")


@contextlib.contextmanager
def in_network_namespace(path: str) -> Iterator[None]:
    """Put the calling thread into the network namespace at `path` and back. Raises: KernelError."""
    with _opened("/proc/thread-self/ns/net") as home, _opened(path) as target:
        setns(target, Namespace.NET)
        try:
            yield
        finally:
            setns(home, Namespace.NET)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Fd]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise os_failure(f"open({path})", error) from error
    try:
        yield Fd(descriptor)
    finally:
        os.close(descriptor)
