"""System calls on other tasks that Python does not offer. No policy."""

from __future__ import annotations

import ctypes

from agent.kernel.syscalls import syscall
from agent.kernel.unistd import SYS

# linux/ioprio.h
_IOPRIO_WHO_PROCESS = 1
# linux/sched/types.h: SCHED_ATTR_SIZE_VER1.
SCHED_ATTRIBUTES_BYTES = 56


def get_scheduling(tid: int) -> bytes:
    """struct sched_attr of a thread.   Source: sched_getattr(2)."""
    buffer = ctypes.create_string_buffer(SCHED_ATTRIBUTES_BYTES)
    syscall(SYS.sched_getattr, tid, ctypes.byref(buffer), SCHED_ATTRIBUTES_BYTES, 0, name=f"sched_getattr({tid})")
    return buffer.raw


def set_scheduling(tid: int, attributes: bytes) -> None:
    """Source: sched_setattr(2)."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    syscall(SYS.sched_setattr, tid, ctypes.byref(buffer), 0, name=f"sched_setattr({tid})")


def get_io_priority(tid: int) -> int:
    """Class and level in one number.   Source: ioprio_get(2)."""
    return syscall(SYS.ioprio_get, _IOPRIO_WHO_PROCESS, tid, name=f"ioprio_get({tid})")


def set_io_priority(tid: int, priority: int) -> None:
    """Source: ioprio_set(2)."""
    syscall(SYS.ioprio_set, _IOPRIO_WHO_PROCESS, tid, priority, name=f"ioprio_set({tid}, {priority:#x})")


def get_robust_list(tid: int) -> tuple[int, int]:
    """Address of the head and its size; address 0: none.   Source: get_robust_list(2)."""
    head, size = ctypes.c_uint64(), ctypes.c_uint64()
    syscall(SYS.get_robust_list, tid, ctypes.byref(head), ctypes.byref(size), name=f"get_robust_list({tid})")
    return head.value, size.value
