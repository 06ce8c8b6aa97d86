"""Registers of each thread: general, floating point and vector state, blocked signals.

Survives: all registers, with fs and gs base, the whole extended state (SSE, AVX, AVX-512, AMX, PKRU), the blocked
set; a system call that our stop interrupted goes on as if it had not been.
Does not survive: relative timeouts of an interrupted call start over where the kernel does not report the rest;
hardware breakpoints.
"""

from __future__ import annotations

from agent.arch import current
from agent.engine.native.tracee import Tracee
from agent.kernel import ptrace
from protocol.errors import RemoteProtocolError
from protocol.messages import Record


class Registers(Record, frozen=True, kw_only=True):
    general: bytes
    extended: bytes
    blocked: int


def dump(tracee: Tracee) -> Registers:
    """The thread's own, as they were when it was stopped."""
    tracee.save()
    return Registers(general=tracee.saved.pack(), extended=tracee.get_xstate(), blocked=tracee.saved_mask)


def restore(record: Registers, tracee: Tracee, *, has_unblocked_signal: bool) -> None:
    """Last of all: nothing may be injected into the thread afterwards."""
    arch = current()
    try:
        general = arch.registers_from(record.general)
    except ValueError as error:
        raise RemoteProtocolError(f"registers of thread {tracee.tid}: {error}") from error
    if not has_unblocked_signal:
        general, _ = arch.fix_interrupted_syscall(general, has_pending_signal=False)
    # else: the kernel delivers the signal first, and decides by its handler whether the call fails or starts over.
    tracee.set_registers(general)
    tracee.set_xstate(record.extended)
    ptrace.set_sigmask(tracee.tid, record.blocked)
