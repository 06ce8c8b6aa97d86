"""Threads: their ids, names and what the C library has told the kernel of each.

Survives: thread ids, names, clear_child_tid, robust futex list, alternate signal stack, timer slack.
Does not survive: nothing that is known of.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence

from agent.engine.native.tasks.plan import CallPlan, Later
from agent.kernel import procfs
from agent.kernel.process import Prctl, get_robust_list
from agent.kernel.unistd import SYS
from protocol.messages import Record, Refusal

# linux/sched.h: a thread as pthread_create makes it, without what the C library adds.
CLONE_THREAD_FLAGS = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000  # VM FS FILES SIGHAND THREAD SYSVSEM
# asm-generic/signal-defs.h
_SS_DISABLE = 2
# struct sigaltstack: pointer, flags and padding, size.
_STACK_BYTES = 24
NAME_BYTES = 16


class ThreadAttributes(Record, frozen=True, kw_only=True):
    name: bytes
    tid_address: int
    alternate_stack: bytes  # struct sigaltstack
    robust_list: int
    robust_list_bytes: int
    timer_slack_ns: int


def dump(tid: int, name: bytes, plan: CallPlan) -> Later[ThreadAttributes]:
    """`tid` is the host's."""
    address = plan.reserve(8)
    plan.must("prctl(PR_GET_TID_ADDRESS)", SYS.prctl, Prctl.GET_TID_ADDRESS, address, 0, 0, 0)
    stack = plan.reserve(_STACK_BYTES)
    plan.must("sigaltstack", SYS.sigaltstack, 0, stack)
    slack = plan.must("prctl(PR_GET_TIMERSLACK)", SYS.prctl, Prctl.GET_TIMERSLACK, 0, 0, 0, 0)
    robust = get_robust_list(tid)

    def read() -> ThreadAttributes:
        (tid_address,) = struct.unpack("<Q", plan.read(address, 8))
        return ThreadAttributes(
            name=name, tid_address=tid_address, alternate_stack=plan.read(stack, _STACK_BYTES),
            robust_list=robust.address, robust_list_bytes=robust.size_bytes, timer_slack_ns=slack.value,
        )  # fmt: skip

    return read


def restore(record: ThreadAttributes, plan: CallPlan) -> None:
    """To be run by the thread itself, on a stack that is not its alternate one."""
    plan.must("set_tid_address", SYS.set_tid_address, record.tid_address)
    plan.must("prctl(PR_SET_NAME)", SYS.prctl, Prctl.SET_NAME, plan.place(record.name.ljust(NAME_BYTES, b"\0")))
    (flags,) = struct.unpack_from("<I", record.alternate_stack, 8)
    if not flags & _SS_DISABLE:
        # SS_ONSTACK is what the kernel says, not what it takes; SS_AUTODISARM (bit 31) is.
        stack = record.alternate_stack[:8] + struct.pack("<I", flags & ~1) + record.alternate_stack[12:]
        plan.must("sigaltstack", SYS.sigaltstack, plan.place(stack), 0)
    if record.robust_list:
        plan.must("set_robust_list", SYS.set_robust_list, record.robust_list, record.robust_list_bytes)
    plan.must("prctl(PR_SET_TIMERSLACK)", SYS.prctl, Prctl.SET_TIMERSLACK, record.timer_slack_ns, 0, 0, 0)


_ESCAPED = re.compile(rb"\\([n\\])")


def unescape_name(text: str) -> bytes:
    r"""The Name of /proc/PID/status as bytes: backslash and newline are escaped in it.   Source: fs/proc/array.c."""
    return _ESCAPED.sub(lambda found: b"\n" if found[1] == b"n" else b"\\", os.fsencode(text))


_STATES = {
    "T": ("stopped", "is stopped (SIGSTOP or the like)", "send it SIGCONT"),
    "t": ("traced", "is stopped by a debugger", "end the debugger"),
    "Z": ("leader-gone", "has ended while other threads run on", ""),
    "X": ("leader-gone", "has ended while other threads run on", ""),
}


def check(statuses: Sequence[bytes], container_pid: int) -> list[Refusal]:
    """Refuse threads that another program holds, or that are stopped."""
    refusals = []
    for data in statuses:
        status = procfs.parse_status(data)
        number = status.ns_pid[-1]
        code, reason, hint = _STATES.get(status.state, ("", "", ""))
        if status.tracer_pid:
            code, reason, hint = "traced", f"is traced by process {status.tracer_pid} of the host", "end the tracer"
        if code:
            refusals.append(
                Refusal(
                    code=code, pid=container_pid, object=f"thread {number} ({status.name})", hint=hint,
                    message=f"thread {number} ({status.name}) of process {container_pid} {reason}",
                )
            )  # fmt: skip
    return refusals
