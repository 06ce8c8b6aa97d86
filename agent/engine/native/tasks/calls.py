"""System calls on other tasks that neither Python nor agent.kernel offers. No policy."""

from __future__ import annotations

import ctypes
import os

from agent.arch import NR
from protocol.errors import KernelError

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

# linux/ioprio.h
_IOPRIO_WHO_PROCESS = 1
# linux/sched/types.h: room for the newest struct sched_attr that is known, SCHED_ATTR_SIZE_VER1.
SCHED_ATTRIBUTES_BYTES = 56


def _call(name: str, number: int, *arguments: ctypes.c_long | ctypes.c_void_p) -> int:
    result: int = _syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise KernelError(name, code, os.strerror(code))
    return result


def get_scheduling(tid: int) -> bytes:
    """struct sched_attr of a thread.   Source: sched_getattr(2)."""
    buffer = ctypes.create_string_buffer(SCHED_ATTRIBUTES_BYTES)
    _call(
        f"sched_getattr({tid})", NR.sched_getattr, ctypes.c_long(tid), ctypes.c_void_p(ctypes.addressof(buffer)),
        ctypes.c_long(SCHED_ATTRIBUTES_BYTES), ctypes.c_long(0),
    )  # fmt: skip
    return buffer.raw


def set_scheduling(tid: int, attributes: bytes) -> None:
    """Source: sched_setattr(2)."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    pointer = ctypes.c_void_p(ctypes.addressof(buffer))
    _call(f"sched_setattr({tid})", NR.sched_setattr, ctypes.c_long(tid), pointer, ctypes.c_long(0))


def get_io_priority(tid: int) -> int:
    """Class and level in one number.   Source: ioprio_get(2)."""
    return _call(f"ioprio_get({tid})", NR.ioprio_get, ctypes.c_long(_IOPRIO_WHO_PROCESS), ctypes.c_long(tid))


def set_io_priority(tid: int, priority: int) -> None:
    """Source: ioprio_set(2)."""
    _call(
        f"ioprio_set({tid}, {priority:#x})", NR.ioprio_set, ctypes.c_long(_IOPRIO_WHO_PROCESS), ctypes.c_long(tid),
        ctypes.c_long(priority),
    )  # fmt: skip


def get_robust_list(tid: int) -> tuple[int, int]:
    """Address of the head and its size; address 0: none.   Source: get_robust_list(2)."""
    head, size = ctypes.c_uint64(), ctypes.c_uint64()
    _call(
        f"get_robust_list({tid})", NR.get_robust_list, ctypes.c_long(tid),
        ctypes.c_void_p(ctypes.addressof(head)), ctypes.c_void_p(ctypes.addressof(size)),
    )  # fmt: skip
    return head.value, size.value
