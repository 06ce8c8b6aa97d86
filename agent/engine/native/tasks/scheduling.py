"""Scheduling of each thread: policy, nice value, allowed CPUs, I/O priority. All from outside, without an injection.

Survives: policy with its parameters, nice value, CPU set, I/O priority.
Does not survive: CPUs of a CPU set that the target does not have.
"""

from __future__ import annotations

import os

from agent.engine.native.tasks import calls
from protocol.messages import Record


class Scheduling(Record, kw_only=True):
    attributes: bytes  # struct sched_attr
    cpus: list[int]  # empty: all that the host has
    io_priority: int


def _cpus(tid: int) -> list[int]:
    allowed = os.sched_getaffinity(tid)
    return [] if len(allowed) >= (os.cpu_count() or 1) else sorted(allowed)


def dump(tid: int) -> Scheduling:
    """Of the host's thread `tid`. Raises: KernelError."""
    return Scheduling(
        attributes=calls.get_scheduling(tid), cpus=_cpus(tid), io_priority=calls.get_io_priority(tid)
    )


def restore(record: Scheduling, tid: int) -> None:
    """Set what differs. Raises: KernelError."""
    if record.attributes != calls.get_scheduling(tid):
        calls.set_scheduling(tid, record.attributes)
    if record.io_priority != calls.get_io_priority(tid):
        calls.set_io_priority(tid, record.io_priority)
    allowed = set(record.cpus) & set(range(os.cpu_count() or 1))
    if allowed and allowed != os.sched_getaffinity(tid):
        os.sched_setaffinity(tid, allowed)
