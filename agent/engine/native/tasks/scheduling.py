"""Scheduling of each thread: policy, nice value, allowed CPUs, I/O priority. All from outside, without an injection.

Survives: policy with its parameters, nice value, CPU set, I/O priority.
Does not survive: CPUs of a CPU set that the target does not have.
"""

from __future__ import annotations

import dataclasses
import os

from agent.kernel import process
from agent.kernel.syscalls import syscall
from agent.kernel.unistd import SYS
from protocol.messages import Record

# linux/ioprio.h
_IOPRIO_WHO_PROCESS = 1


class Scheduling(Record, frozen=True, kw_only=True):
    policy: int
    flags: int
    nice: int
    priority: int
    runtime_ns: int
    deadline_ns: int
    period_ns: int
    utilization_min: int
    utilization_max: int
    cpus: list[int]  # empty: all that the host has
    io_priority: int


def dump(tid: int) -> Scheduling:
    """Of the host's thread `tid`. Raises: KernelError."""
    allowed = os.sched_getaffinity(tid)
    return Scheduling(
        **dataclasses.asdict(process.get_scheduling(tid)),
        cpus=[] if len(allowed) >= (os.cpu_count() or 1) else sorted(allowed),
        io_priority=syscall(SYS.ioprio_get, _IOPRIO_WHO_PROCESS, tid, name=f"ioprio_get({tid})"),
    )


def restore(record: Scheduling, tid: int) -> None:
    """Set what differs. Raises: KernelError."""
    wanted = process.SchedulingAttributes(
        policy=record.policy, flags=record.flags, nice=record.nice, priority=record.priority,
        runtime_ns=record.runtime_ns, deadline_ns=record.deadline_ns, period_ns=record.period_ns,
        utilization_min=record.utilization_min, utilization_max=record.utilization_max,
    )  # fmt: skip
    if wanted != process.get_scheduling(tid):
        process.set_scheduling(tid, wanted)
    if record.io_priority != syscall(SYS.ioprio_get, _IOPRIO_WHO_PROCESS, tid):
        syscall(SYS.ioprio_set, _IOPRIO_WHO_PROCESS, tid, record.io_priority, name=f"ioprio_set({tid})")
    allowed = set(record.cpus) & set(range(os.cpu_count() or 1))
    if allowed and allowed != os.sched_getaffinity(tid):
        os.sched_setaffinity(tid, allowed)
