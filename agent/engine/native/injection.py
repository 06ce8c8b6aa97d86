"""Running plans of system calls in all threads of a process at the same time."""

from __future__ import annotations

from collections.abc import Sequence

from agent.arch.base import BATCH_ROW_BYTES
from agent.engine.native.remote import RemoteSyscalls
from agent.engine.native.tasks.plan import CallPlan
from agent.engine.native.tracee import Tracee
from agent.kernel import memory

# The leader asks for the process as well: 64 signal actions of 32 bytes, auxv, paths.
LEADER_ARENA_BYTES = 16384
# One thread: credentials may take a call for each capability, twice.
THREAD_ROWS = 160
THREAD_ARENA_BYTES = 2048
_SLOT_BYTES = THREAD_ROWS * BATCH_ROW_BYTES + THREAD_ARENA_BYTES
# What a scratch needs beside the slots: code, the leader's table, its data, a stack.
_BASE_BYTES = 0x40000
MAX_SCRATCH_BYTES = 0x180000


def scratch_bytes(threads: int) -> int:
    """A scratch for that many threads at once; more take turns."""
    wanted = _BASE_BYTES + threads * (_SLOT_BYTES + 64)
    return min(MAX_SCRATCH_BYTES, -(-wanted // 0x10000) * 0x10000)


class Injection:
    """The threads of one stopped process. `remote` is the leader's, with a scratch mapped."""

    def __init__(self, remote: RemoteSyscalls, others: Sequence[Tracee]) -> None:
        self._leader = remote
        self._others = list(others)
        remote.reset()
        self._leader_base = remote.reserve(LEADER_ARENA_BYTES)
        self._slots: list[RemoteSyscalls] = []
        self._bases: list[int] = []
        for tracee in self._others:
            try:
                slot = remote.share_scratch(tracee, rows=THREAD_ROWS, data_bytes=THREAD_ARENA_BYTES)
            except MemoryError:
                if not self._slots:
                    raise
                break
            self._slots.append(slot)
            self._bases.append(slot.reserve(THREAD_ARENA_BYTES))
        for tracee in self._others:
            tracee.save()
        self._running: list[tuple[RemoteSyscalls, CallPlan]] = []
        self._waiting: list[tuple[Tracee, CallPlan]] = []

    def plan(self) -> tuple[CallPlan, list[CallPlan]]:
        """Empty plans: the leader's, and one for each other thread in their order."""
        count = len(self._slots)
        others = [CallPlan(self._bases[index % count], THREAD_ARENA_BYTES) for index in range(len(self._others))]
        return CallPlan(self._leader_base, LEADER_ARENA_BYTES), others

    def run(self, leader: CallPlan, others: Sequence[CallPlan]) -> None:
        """Run all and load the answers. Raises: KernelError: a call that must succeed failed; all were run."""
        self.start(leader, others)
        self.finish()

    def start(self, leader: CallPlan, others: Sequence[CallPlan]) -> None:
        """Set as many going as have room; `finish` waits for them and runs the rest."""
        assert not self._running, "finish first"
        pairs = [(tracee, plan) for tracee, plan in zip(self._others, others, strict=True) if len(plan)]
        self._waiting = pairs[len(self._slots) :]
        for slot, (tracee, plan) in zip(self._slots, pairs, strict=False):
            self._start(slot, tracee, plan)
        if len(leader):
            self._start(self._leader, self._leader.tracee, leader)

    def _start(self, slot: RemoteSyscalls, tracee: Tracee, plan: CallPlan) -> None:
        slot.tracee = tracee
        if plan.has_placed:
            memory.process_vm_write(tracee.tid, plan.base, plan.memory)
        slot.start_batch(plan.calls, keep_going=True)
        self._running.append((slot, plan))

    def finish(self) -> None:
        """Raises: KernelError: as `run`."""
        while self._running:
            running, self._running = self._running, []
            for slot, plan in running:
                results = slot.finish_batch()
                size = len(plan.memory)
                plan.keep(results, memory.process_vm_read(slot.tracee.tid, plan.base, size) if size else b"")
            turn, self._waiting = self._waiting[: len(self._slots)], self._waiting[len(self._slots) :]
            for slot, (tracee, plan) in zip(self._slots, turn, strict=False):
                self._start(slot, tracee, plan)
            for _, plan in running:
                plan.check_all()
