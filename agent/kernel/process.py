"""Facts and settings of processes that have no file in /proc: kcmp, robust list, prctl, scheduling attributes."""

from __future__ import annotations

import ctypes
import enum
import struct
from dataclasses import dataclass
from typing import Any

from agent.kernel.syscalls import syscall
from agent.kernel.unistd import SYS


class Prctl(enum.IntEnum):
    """PR_* (linux/prctl.h)"""

    SET_PDEATHSIG = 1
    GET_PDEATHSIG = 2
    GET_DUMPABLE = 3
    SET_DUMPABLE = 4
    GET_KEEPCAPS = 7
    SET_KEEPCAPS = 8
    SET_NAME = 15
    GET_NAME = 16
    CAPBSET_READ = 23
    CAPBSET_DROP = 24
    GET_SECUREBITS = 27
    SET_SECUREBITS = 28
    SET_TIMERSLACK = 29
    GET_TIMERSLACK = 30
    SET_MM = 35
    SET_CHILD_SUBREAPER = 36
    GET_CHILD_SUBREAPER = 37
    SET_NO_NEW_PRIVS = 38
    GET_NO_NEW_PRIVS = 39
    GET_TID_ADDRESS = 40
    SET_THP_DISABLE = 41
    GET_THP_DISABLE = 42
    CAP_AMBIENT = 47
    SET_IO_FLUSHER = 57
    SET_VMA = 0x53564D41


PR_SET_MM_MAP = 14
PR_SET_MM_MAP_SIZE = 15
PR_SET_VMA_ANON_NAME = 0
PR_CAP_AMBIENT_IS_SET = 1
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_LOWER = 3
PR_CAP_AMBIENT_CLEAR_ALL = 4


def prctl(option: int, *arguments: Any) -> int:
    """For the calling thread. Raises: KernelError. Source: prctl(2)."""
    padded = [*arguments, 0, 0, 0, 0][:4]
    return syscall(SYS.prctl, int(option), *padded, name=f"prctl({option})")


class Kcmp(enum.IntEnum):
    """KCMP_* (linux/kcmp.h): what is compared."""

    FILE = 0
    VM = 1
    FILES = 2
    FS = 3
    SIGHAND = 4
    IO = 5
    SYSVSEM = 6
    EPOLL_TFD = 7


def kcmp(pid1: int, pid2: int, kind: Kcmp, index1: int = 0, index2: int = 0) -> int:
    """0 when both tasks share the resource; 1 less, 2 greater: an order to sort by; 3 unequal, no order.

    Raises: KernelError: EBADF, EPERM. TaskGoneError.   Source: kcmp(2).
    """
    return syscall(SYS.kcmp, pid1, pid2, int(kind), index1, index2, name=f"kcmp({pid1}, {pid2}, {kind.name})")


@dataclass(frozen=True, slots=True)
class RobustList:
    """Address 0 when the thread has none."""

    address: int
    size_bytes: int


def get_robust_list(tid: int) -> RobustList:
    """Source: get_robust_list(2)."""
    head, size = ctypes.c_ulong(), ctypes.c_ulong()
    call = f"get_robust_list({tid})"
    syscall(SYS.get_robust_list, tid, ctypes.byref(head), ctypes.byref(size), name=call)
    return RobustList(head.value, size.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingAttributes:
    """struct sched_attr, version 1 (linux/sched/types.h). Times in ns."""

    policy: int
    flags: int
    nice: int
    priority: int
    runtime_ns: int
    deadline_ns: int
    period_ns: int
    utilization_min: int
    utilization_max: int


_SCHED_ATTR = struct.Struct("=IIQiIQQQII")


def get_scheduling(tid: int) -> SchedulingAttributes:
    """Source: sched_getattr(2)."""
    buffer = ctypes.create_string_buffer(_SCHED_ATTR.size)
    syscall(SYS.sched_getattr, tid, ctypes.byref(buffer), _SCHED_ATTR.size, 0, name=f"sched_getattr({tid})")
    _, policy, flags, nice, priority, runtime, deadline, period, low, high = _SCHED_ATTR.unpack(buffer.raw)
    return SchedulingAttributes(
        policy=policy, flags=flags, nice=nice, priority=priority, runtime_ns=runtime, deadline_ns=deadline,
        period_ns=period, utilization_min=low, utilization_max=high,
    )  # fmt: skip


def set_scheduling(tid: int, attributes: SchedulingAttributes) -> None:
    """Source: sched_setattr(2). Raises: KernelError: EPERM."""
    a = attributes
    data = _SCHED_ATTR.pack(
        _SCHED_ATTR.size, a.policy, a.flags, a.nice, a.priority, a.runtime_ns, a.deadline_ns, a.period_ns,
        a.utilization_min, a.utilization_max,
    )  # fmt: skip
    syscall(SYS.sched_setattr, tid, data, 0, name=f"sched_setattr({tid})")
