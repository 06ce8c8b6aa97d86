"""System calls that neither Python nor the C library offers, as the open files need them. No policy."""

from __future__ import annotations

import ctypes
import enum
import os
from collections.abc import Iterator
from contextlib import contextmanager

from protocol.errors import KernelError

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

# asm-generic numbers, the same on every machine since 5.0.
_NR_PIDFD_GETFD = 438
_NR_OPENAT2 = 437
# The one number that differs: found by asking, see `_find_kcmp`.
_NR_KCMP = {"x86_64": 312, "aarch64": 272}

# linux/kcmp.h
KCMP_FILE = 0
KCMP_EPOLL_TFD = 7
# linux/openat2.h
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_IN_ROOT = 0x10
# linux/sched.h
CLONE_NEWNET = 0x40000000
# linux/splice.h
SPLICE_F_NONBLOCK = 0x02


def _raise(call: str) -> KernelError:
    number = ctypes.get_errno()
    return KernelError(call, number, os.strerror(number))


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A duplicate, close-on-exec, of `fd` of the process behind `pidfd`; the caller closes it.

    Raises: KernelError: EBADF it is not open there, ESRCH the process is gone.   Source: pidfd_getfd(2) (Linux 5.6).
    """
    got: int = _syscall(ctypes.c_long(_NR_PIDFD_GETFD), ctypes.c_int(pidfd), ctypes.c_int(fd), ctypes.c_uint(0))
    if got < 0:
        raise _raise(f"pidfd_getfd(fd {fd})")
    return got


class Order(enum.IntEnum):
    """What kcmp(2) says of two open files."""

    SAME = 0
    LESS = 1
    GREATER = 2
    DIFFERENT = 3


class Comparer:
    """kcmp(2) with its number found once."""

    def __init__(self) -> None:
        own = os.getpid()
        with open("/dev/null", "rb") as null:  # noqa: PTH123 - only the number matters
            for number in _NR_KCMP.values():
                if self._call(number, own, own, null.fileno(), null.fileno()) == 0:
                    self._number = number
                    return
        raise _raise("kcmp(KCMP_FILE)")

    @staticmethod
    def _call(number: int, pid: int, other_pid: int, fd: int, other_fd: int) -> int:
        result: int = _syscall(
            ctypes.c_long(number),
            ctypes.c_int(pid),
            ctypes.c_int(other_pid),
            ctypes.c_int(KCMP_FILE),
            ctypes.c_ulong(fd),
            ctypes.c_ulong(other_fd),
        )
        return result

    def compare(self, pid: int, fd: int, other_pid: int, other_fd: int) -> Order:
        """How the open file behind `fd` of `pid` orders against `other_fd` of `other_pid`.

        Raises: KernelError: EBADF one of them is not open.   Source: kcmp(2).
        """
        result = self._call(self._number, pid, other_pid, fd, other_fd)
        if result < 0:
            raise _raise(f"kcmp(fd {fd}, fd {other_fd})")
        return Order(result)

    def is_epoll_target(self, pid: int, fd: int, epoll_fd: int) -> bool:
        """Whether `epoll_fd` watches, under the number `fd`, the open file that is there now.

        Source: kcmp(2), KCMP_EPOLL_TFD (Linux 4.13).
        """
        slot = (ctypes.c_uint32 * 3)(epoll_fd, fd, 0)
        result: int = _syscall(
            ctypes.c_long(self._number),
            ctypes.c_int(pid),
            ctypes.c_int(pid),
            ctypes.c_int(KCMP_EPOLL_TFD),
            ctypes.c_ulong(fd),
            ctypes.byref(slot),
        )
        return result == Order.SAME

    def is_same(self, pid: int, fd: int, other_pid: int, other_fd: int) -> bool:
        """Whether both are open and are one open file."""
        return self._call(self._number, pid, other_pid, fd, other_fd) == Order.SAME


def tee(source: int, target: int, size_bytes: int) -> int:
    """Duplicate up to `size_bytes` of pipe `source` into pipe `target` without consuming them.

    Raises: KernelError: EAGAIN nothing there.   Source: tee(2).
    """
    copied: int = _libc.tee(
        ctypes.c_int(source), ctypes.c_int(target), ctypes.c_size_t(size_bytes), ctypes.c_uint(SPLICE_F_NONBLOCK)
    )
    if copied < 0:
        raise _raise("tee(2)")
    return copied


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_in_root(root_fd: int, path: str, flags: int) -> int:
    """Open `path` as a process whose root is `root_fd` would find it, following no magic links; close-on-exec.

    Raises: KernelError.   Source: openat2(2) (Linux 5.6).
    """
    how = _OpenHow(flags | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    got: int = _syscall(
        ctypes.c_long(_NR_OPENAT2),
        ctypes.c_int(root_fd),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if got < 0:
        raise _raise(f"openat2({path}, RESOLVE_IN_ROOT)")
    return got


def _setns(fd: int, kind: int) -> None:
    if _libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)) < 0:
        raise _raise("setns(CLONE_NEWNET)")


@contextmanager
def in_network_namespace(path: str) -> Iterator[None]:
    """This thread in the network namespace at `path`, and back.   Source: setns(2)."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(there, CLONE_NEWNET)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(before, CLONE_NEWNET)
    finally:
        os.close(before)


def read_proc(path: str) -> str:
    """A whole small file of procfs; three system calls and no buffering, for the freeze."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, 65536)
        if len(data) < 65536:  # fdinfo and its like are made whole by the first read
            return data.decode("utf-8", "surrogateescape")
        chunks = [data]
        while chunk := os.read(fd, 1 << 20):
            chunks.append(chunk)
        return b"".join(chunks).decode("utf-8", "surrogateescape")
    finally:
        os.close(fd)
