"""Timers of a process: the three interval timers, and POSIX timers.

Survives: ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF with what is left of them and their interval.
Does not survive: POSIX timers (timer_create); a process that has one is refused. CPU time counters start at zero.
"""

from __future__ import annotations

from agent.engine.native.tasks.plan import CallPlan, Later
from agent.kernel.procfs import read_proc
from agent.kernel.unistd import SYS
from protocol.messages import Record, Refusal

# struct itimerval: interval and value, each seconds and microseconds.
ITIMER_BYTES = 32
_NOTHING = bytes(ITIMER_BYTES)


class IntervalTimers(Record, frozen=True, kw_only=True):
    """struct itimerval of ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF."""

    values: list[bytes]


def check(pid: int, container_pid: int) -> list[Refusal]:
    """Refuse POSIX timers.   Source: proc_pid_timers(5)."""
    count = count_posix_timers(read_proc(f"/proc/{pid}/timers"))
    if not count:
        return []
    return [
        Refusal(
            code="posix-timers", pid=container_pid, object=f"{count} POSIX timers",
            message=f"process {container_pid} has {count} POSIX timers (timer_create), which are not carried yet",
        )
    ]  # fmt: skip


def count_posix_timers(timers: bytes) -> int:
    """In the text of /proc/PID/timers."""
    return timers.count(b"ID: ")


def dump(plan: CallPlan) -> Later[IntervalTimers]:
    where = plan.reserve(3 * ITIMER_BYTES)
    for which in range(3):
        plan.must("getitimer", SYS.getitimer, which, where + which * ITIMER_BYTES)

    def read() -> IntervalTimers:
        data = plan.read(where, 3 * ITIMER_BYTES)
        return IntervalTimers(values=[data[i * ITIMER_BYTES : (i + 1) * ITIMER_BYTES] for i in range(3)])

    return read


def restore(record: IntervalTimers, plan: CallPlan) -> None:
    """Start them again; last of the process's steps, because they run at once."""
    for which, value in enumerate(record.values):
        if value != _NOTHING:
            plan.must("setitimer", SYS.setitimer, which, plan.place(value), 0)
