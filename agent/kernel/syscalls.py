"""Calling the kernel: system calls by number, and one way to turn an errno into an error of ours."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any

from agent.kernel.unistd import SYS
from protocol.errors import KernelError, MigrateError, TaskGoneError

libc = ctypes.CDLL(None, use_errno=True)
_syscall = libc.syscall
_syscall.restype = ctypes.c_long
_c_ulong = ctypes.c_ulong
get_errno = ctypes.get_errno


class IoVector(ctypes.Structure):
    """struct iovec (uio.h)."""

    base: int
    size: int
    _fields_ = [("base", ctypes.c_ulong), ("size", ctypes.c_ulong)]


def failure(call: str, number: int, text: str = "") -> MigrateError:
    """The error for errno `number` of `call`: TaskGoneError for ESRCH, else KernelError."""
    if number == errno.ESRCH:
        return TaskGoneError(f"{call}: {text or 'no such task, or it is not stopped'}")
    return KernelError(call, number, text or os.strerror(number))


def os_failure(call: str, error: OSError) -> MigrateError:
    """The same, for what the os module raised."""
    return failure(call, error.errno or 0)


def syscall(number: int, *args: Any, name: str = "") -> int:
    """Call `number` with integers (of any sign), bytes or ctypes objects.

    Raises: KernelError, TaskGoneError (ESRCH).   Source: syscall(2).
    """
    result: int = _syscall(_c_ulong(number), *[_c_ulong(a) if isinstance(a, int) else a for a in args])
    if result == -1:
        raise failure(name or SYS.name_of(number), get_errno())
    return result
