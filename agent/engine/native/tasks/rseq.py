"""Restartable sequences: the area that each thread has registered with the kernel.

Survives: the registration; a thread that is stopped inside a critical section goes on at its abort handler.
Does not survive: nothing that is known of.
"""

from __future__ import annotations

import struct

from agent.engine.native.tasks.plan import CallPlan
from agent.kernel.unistd import SYS
from protocol.messages import Record

# struct rseq (linux/rseq.h): cpu_id_start, cpu_id, then the pointer to the critical section.
_SECTION_POINTER_OFFSET = 8
# struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip.
_SECTION = struct.Struct("<IIQQQ")


class Rseq(Record, frozen=True, kw_only=True):
    """What the thread registered; address 0: nothing."""

    address: int
    size_bytes: int
    signature: int
    flags: int


def pointer_address(record: Rseq) -> int:
    """Where the pointer to the critical section is."""
    return record.address + _SECTION_POINTER_OFFSET


SECTION_BYTES = _SECTION.size


def abort_address(section: bytes, instruction: int) -> int | None:
    """Where a thread at `instruction` has to go on if that is inside the critical section; None: it is outside.

    The kernel does this whenever it preempts a thread; a stop of ours is no less. It cannot do it for us: by the
    time the thread runs with its own registers again it has forgotten the section.
    Source: rseq_ip_fixup, kernel/rseq.c.
    """
    _, _, start, length, abort = _SECTION.unpack(section)
    return abort if start <= instruction < start + length else None


def restore(record: Rseq, plan: CallPlan) -> None:
    """Register; the last step of a thread, once the memory is written: the kernel writes into it from now on."""
    if record.address:
        plan.must("rseq", SYS.rseq, record.address, record.size_bytes, record.flags, record.signature)
