"""System calls on open files that the other wrappers do not have: kcmp(2), tee(2), and a quick read of fdinfo."""

from __future__ import annotations

import ctypes
import enum
import os

from agent.kernel.syscalls import failure, get_errno, libc
from agent.kernel.unistd import SYS
from protocol.errors import MigrateError

_syscall = libc.syscall
_c_long = ctypes.c_long

# linux/kcmp.h
KCMP_FILE = 0
KCMP_EPOLL_TFD = 7
# linux/splice.h
SPLICE_F_NONBLOCK = 0x02
_READ_BYTES = 65536


def _failure(call: str) -> MigrateError:
    return failure(call, get_errno())


class Order(enum.IntEnum):
    """What kcmp(2) says of two open files."""

    SAME = 0
    LESS = 1
    GREATER = 2
    DIFFERENT = 3


def _kcmp(pid: int, other_pid: int, fd: int, other_fd: int) -> int:
    result: int = _syscall(
        _c_long(SYS.kcmp), _c_long(pid), _c_long(other_pid), _c_long(KCMP_FILE), _c_long(fd), _c_long(other_fd)
    )
    return result


def compare_open_files(pid: int, fd: int, other_pid: int, other_fd: int) -> Order:
    """How the open file behind `fd` of `pid` orders against `other_fd` of `other_pid`.

    Raises: KernelError: EBADF one of them is not open. TaskGoneError.   Source: kcmp(2).
    """
    result = _kcmp(pid, other_pid, fd, other_fd)
    if result < 0:
        raise _failure(f"kcmp(fd {fd}, fd {other_fd})")
    return Order(result)


def is_same_open_file(pid: int, fd: int, other_pid: int, other_fd: int) -> bool:
    """Whether both are open and are one open file."""
    return _kcmp(pid, other_pid, fd, other_fd) == Order.SAME


def is_epoll_target(pid: int, fd: int, epoll_fd: int) -> bool:
    """Whether `epoll_fd` watches, under the number `fd`, the open file that is there now.

    Source: kcmp(2), KCMP_EPOLL_TFD (Linux 4.13).
    """
    slot = (ctypes.c_uint32 * 3)(epoll_fd, fd, 0)
    result: int = _syscall(
        _c_long(SYS.kcmp), _c_long(pid), _c_long(pid), _c_long(KCMP_EPOLL_TFD), _c_long(fd), ctypes.byref(slot)
    )
    return result == Order.SAME


def tee(source: int, target: int, size_bytes: int) -> int:
    """Duplicate up to `size_bytes` of pipe `source` into pipe `target` without consuming them.

    Raises: KernelError: EAGAIN nothing there.   Source: tee(2).
    """
    copied: int = libc.tee(
        ctypes.c_int(source), ctypes.c_int(target), ctypes.c_size_t(size_bytes), ctypes.c_uint(SPLICE_F_NONBLOCK)
    )
    if copied < 0:
        raise _failure("tee(2)")
    return copied


def read_small(path: str) -> bytes:
    """A file of procfs that is made whole by one read (fdinfo is); three system calls, for the freeze.

    Raises: FileNotFoundError: not there (any more).
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, _READ_BYTES)
        while len(data) % _READ_BYTES == 0 and (more := os.read(fd, _READ_BYTES)):
            data += more
        return data
    finally:
        os.close(fd)
