"""Signals: what a process does on each, what is pending and what is blocked.

Survives: handlers, ignored signals, flags and masks; the blocked set and the alternate stack of each thread; signals
that are pending, with their sender and value, for the process and for each thread.
Does not survive: a process that is stopped by SIGSTOP, SIGTSTP, SIGTTIN or SIGTTOU (refused; SIGCONT it first).
"""

from __future__ import annotations

import signal

from agent.engine.native.tasks.plan import CallPlan, Later
from agent.kernel.unistd import SYS
from protocol.messages import Record

SIGNALS = range(1, 65)
# The kernel's struct sigaction: handler, flags, restorer, mask.
ACTION_BYTES = 32
SIGSET_BYTES = 8
SIGINFO_BYTES = 128
_UNCHANGEABLE = frozenset({signal.SIGKILL, signal.SIGSTOP})
_DEFAULT = bytes(ACTION_BYTES)
_SIG_IGN = (1).to_bytes(8, "little")


class SignalActions(Record, frozen=True, kw_only=True):
    """What a process does on each signal; one that is not listed has its default action."""

    numbers: list[int]
    actions: list[bytes]  # struct sigaction as rt_sigaction takes it


class PendingSignals(Record, frozen=True, kw_only=True):
    """siginfo of each signal that waits, in order."""

    shared: tuple[bytes, ...] = ()  # for the process; the leader's record has them
    private: tuple[bytes, ...] = ()


def dump_actions(plan: CallPlan, *, trap_is_ignored: bool) -> Later[SignalActions]:
    """Plan the questions, for any one thread of the process.

    `trap_is_ignored`: as it was before any injection, whose traps make an ignored SIGTRAP the default.
    """
    where = plan.reserve(ACTION_BYTES * len(SIGNALS))
    for index, number in enumerate(SIGNALS):
        plan.must("rt_sigaction", SYS.rt_sigaction, number, 0, where + index * ACTION_BYTES, SIGSET_BYTES)

    def read() -> SignalActions:
        data = plan.read(where, ACTION_BYTES * len(SIGNALS))
        found = {
            number: data[index * ACTION_BYTES : (index + 1) * ACTION_BYTES] for index, number in enumerate(SIGNALS)
        }
        if trap_is_ignored:
            found[signal.SIGTRAP] = _SIG_IGN + found[signal.SIGTRAP][len(_SIG_IGN) :]
        found = {number: action for number, action in found.items() if action != _DEFAULT}
        return SignalActions(numbers=list(found), actions=list(found.values()))

    return read


def restore_actions(record: SignalActions, plan: CallPlan) -> None:
    """Set all: what execve left is either default or ignored."""
    actions = dict(zip(record.numbers, record.actions, strict=True))
    default = plan.place(_DEFAULT)
    for number in SIGNALS:
        if number in _UNCHANGEABLE:
            continue
        action = actions.get(number)
        where = default if action is None else plan.place(action)
        plan.must("rt_sigaction", SYS.rt_sigaction, number, where, 0, SIGSET_BYTES)


def ignored_trap(record: SignalActions) -> bytes | None:
    """The action of SIGTRAP if it is 'ignore': the trap at the end of a batch makes that the default.

    The caller sets it again with a call that ends in no trap.   Source: force_sig_info_to_task in kernel/signal.c.
    """
    for number, action in zip(record.numbers, record.actions, strict=True):
        if number == signal.SIGTRAP and action[:8] == _SIG_IGN:
            return action
    return None


def restore_pending(record: PendingSignals, plan: CallPlan, *, tgid: int, tid: int) -> None:
    """Queue the signals again, from the thread itself: only then may the sender be somebody else.

    `tgid` and `tid` are the container's. To be run while every signal but SIGTRAP is blocked, after the actions are
    set: setting 'ignore' throws away what is pending.   Source: rt_sigqueueinfo(2).
    """
    for info in record.shared:
        plan.must("rt_sigqueueinfo", SYS.rt_sigqueueinfo, tgid, _number(info), plan.place(info))
    for info in record.private:
        plan.must("rt_tgsigqueueinfo", SYS.rt_tgsigqueueinfo, tgid, tid, _number(info), plan.place(info))


def _number(info: bytes) -> int:
    return int.from_bytes(info[:4], "little")


def is_unblocked_pending(pending: PendingSignals, mask: int) -> bool:
    """Whether a signal will be delivered as soon as the thread runs."""
    return any(not mask >> (_number(info) - 1) & 1 for info in (*pending.shared, *pending.private))
