"""Registers of each thread: general, floating point and vector state, blocked signals.

Survives: all registers, with fs and gs base, the whole extended state (SSE, AVX, AVX-512, AMX, PKRU), the blocked
set; a system call that our stop interrupted goes on as if it had not been.
Does not survive: relative timeouts of an interrupted call start over where the kernel does not report the rest;
hardware breakpoints.
"""

from __future__ import annotations

from agent import arch
from agent.engine.native.tracee import Tracee
from protocol.messages import Record


class Registers(Record, kw_only=True):
    general: bytes
    extended: bytes
    blocked: int


def dump(tracee: Tracee) -> Registers:
    """The thread's own, as saved when it was stopped."""
    raise NotImplementedError


def restore(record: Registers, tracee: Tracee, *, has_unblocked_signal: bool) -> None:
    """Last of all: nothing may be injected into the thread afterwards."""
    raise NotImplementedError
