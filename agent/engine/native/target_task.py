"""One process of the target while it is built: from the exec of the runtime's init to the frozen, complete task."""

from __future__ import annotations

from collections.abc import Sequence

from agent.arch import current
from agent.engine import base
from agent.engine.native import sections
from agent.engine.native.pid_numbers import PidNumbers
from agent.engine.native.remote import RemoteSyscalls, Scratch
from agent.engine.native.tasks import credentials, layout, threads, vdso
from agent.engine.native.tasks.memory import Area, changes
from agent.engine.native.tasks.plan import CallPlan
from agent.engine.native.tracee import Tracee
from agent.kernel import procfs, ptrace
from agent.kernel.memory import process_vm_read, process_vm_write
from agent.kernel.pagemap import PAGE_BYTES
from agent.kernel.types import Pid, Tid
from agent.kernel.unistd import SYS
from protocol.errors import MigrateError, RemoteProtocolError, UnsupportedError

# Scratch, and room above it for the vDSO's temporary place: all of it below 0x400000, where programs that are not
# position independent begin.
_SCRATCH_BYTES = 0x180000
_VDSO_ROOM_BYTES = 0x40000
# The lowest address that mmap_min_addr leaves to anybody, and the end of a process's own half.
_LOWEST = 0x10000
_HIGHEST = 0x7FFF_FFFF_F000
_FIRST_DESCRIPTOR = 3
_LAST_DESCRIPTOR = 0xFFFFFFFF
_CALLS_AT_ONCE = 1000


class TargetTask:
    """Raises (all methods): KernelError, TaskGoneError; RemoteProtocolError: the source says what cannot be."""

    def __init__(self, number: int, tracee: Tracee) -> None:
        self.number = number
        self.pid = tracee.pid
        self.leader = tracee
        self.remote = RemoteSyscalls(tracee)
        self.others: dict[int, Tracee] = {}  # by the thread's number in the container
        self.container_pid = procfs.read_namespace_pids(tracee.pid)[-1]
        self._areas: list[Area] = []
        self._vdso: vdso.Vdso
        self._numbers: PidNumbers | None = None

    def opened(self) -> base.OpenTask:
        """For the stream."""
        return base.OpenTask(task=self.number, pid=self.pid, start_time=procfs.read_start_time(self.pid))

    # ------------------------------------------------------------ the empty shell

    def begin(self, section: sections.BeginSection) -> None:
        """Look whether this shell is what the source's process needs."""
        if section.version != sections.VERSION:
            raise UnsupportedError(
                f"the source's engine speaks version {section.version} of the sections, this one {sections.VERSION}",
                code="engine-version", hint="install the same version on both hosts",
            )  # fmt: skip
        if section.architecture != current().name:
            raise UnsupportedError(f"the source is {section.architecture}, this host {current().name}", code="machine")
        exe = procfs.read_link(f"/proc/{self.pid}/exe")
        if exe != section.exe:
            raise MigrateError(f"the container's init here runs {exe}, on the source {section.exe}", code="exe-differs")
        status = procfs.read_proc(f"/proc/{self.pid}/status")
        credentials.check_same_seccomp(section.seccomp, credentials.seccomp_of_status(status))
        vdso.check_same(section.vdso, vdso.find(self.pid, procfs.read_maps(self.pid)))
        self._vdso = section.vdso

    def _strip(self, areas: Sequence[Area]) -> None:
        """Make room: of what execve mapped only the vDSO stays, at the source's address."""
        lines = procfs.read_maps(self.pid)
        here = vdso.find(self.pid, lines)
        taken = [*((area.start, area.end) for area in areas), *((line.start, line.end) for line in lines)]
        taken.append((self._vdso.start, self._vdso.start + self._vdso.size_bytes))
        self.remote.map_scratch([_with_room_before(taken)], _SCRATCH_BYTES)
        scratch = self._scratch
        self._move_vdso(here, scratch.end)
        moved = vdso.Vdso(start=scratch.end, parts=here.parts, digest=here.digest)
        moved_end = moved.start + moved.size_bytes
        self._batch(
            [
                (SYS.munmap, _LOWEST, scratch.start - _LOWEST),
                (SYS.munmap, moved_end, _HIGHEST - moved_end),
                (SYS.close_range, _FIRST_DESCRIPTOR, _LAST_DESCRIPTOR, 0),
            ]
        )
        self._move_vdso(moved, self._vdso.start)

    @property
    def _scratch(self) -> Scratch:
        assert self.remote.scratch is not None
        return self.remote.scratch

    def _move_vdso(self, here: vdso.Vdso, start: int) -> None:
        plan = self._plan(256)
        vdso.move(here, start, plan)
        address = self.remote.syscall_address
        self._run_plan(plan)
        self.remote.syscall_address = address - here.start + start

    # ------------------------------------------------------------ memory

    def lay_out(self, areas: Sequence[Area]) -> None:
        """Map what is new, unmap what is gone; nothing else is touched."""
        if self.remote.scratch is None:
            self._strip(areas)
        self._check_areas(areas)
        difference = changes(self._areas, areas)
        self._batch(layout.calls_for_unmapping(difference))
        for first in range(0, len(difference.make), _CALLS_AT_ONCE):
            plan = self._plan(65536)
            opened = layout.plan_opening(difference.make[first : first + _CALLS_AT_ONCE], plan)
            self._run_plan(plan)
            plan = self._plan(65536)
            layout.plan_mapping(difference.make[first : first + _CALLS_AT_ONCE], opened(), plan)
            self._run_plan(plan)
        hints = layout.hints(self._areas, difference, areas)
        for first in range(0, len(hints), _CALLS_AT_ONCE):
            plan = self._plan(65536)
            layout.plan_hints(hints[first : first + _CALLS_AT_ONCE], plan)
            self._run_plan(plan)
        self._areas = list(areas)

    def _check_areas(self, areas: Sequence[Area]) -> None:
        """Nothing of the source may lie over our scratch or the vDSO."""
        ours = [(self._scratch.start, self._scratch.end), (self._vdso.start, self._vdso.start + self._vdso.size_bytes)]
        before = 0
        for area in areas:
            if area.start < before or area.end <= area.start or (area.start | area.end) % PAGE_BYTES:
                raise RemoteProtocolError(f"an area from {area.start:#x} to {area.end:#x} out of order")
            before = area.end
            for start, end in ours:
                if area.start < end and start < area.end:
                    raise UnsupportedError(
                        f"the program has mapped {area.start:#x}-{area.end:#x}, where the engine works; try again",
                        code="scratch-collision",
                    )

    def protect(self, section: sections.ProtectSection) -> None:
        """Set protections."""
        rows = zip(section.starts, section.sizes, section.prots, strict=True)
        self._batch([(SYS.mprotect, start, size, prot) for start, size, prot in rows])

    def drop(self, section: sections.HolesSection) -> None:
        """Give pages back."""
        rows = zip(section.starts, section.sizes, strict=True)
        self._batch(
            [call for start, size in rows for call in layout.calls_for_dropping(self._areas, start, start + size)]
        )

    def _batch(self, calls: Sequence[tuple[int, ...]]) -> None:
        for first in range(0, len(calls), _CALLS_AT_ONCE):
            self.remote.batch(calls[first : first + _CALLS_AT_ONCE])

    def lock(self) -> None:
        """Lock what is locked on the source; after its pages came, so that none is made twice."""
        self._batch(layout.calls_for_locking(self._areas))

    # ------------------------------------------------------------ threads

    def make_threads(self, wanted: Sequence[int]) -> None:
        """Threads with these numbers, the leader's first: what is missing is made, what is too many ends."""
        if not wanted or wanted[0] != self.container_pid or len(set(wanted)) != len(wanted):
            raise UnsupportedError(
                f"the container's init is process {wanted[:1]} on the source, here {self.container_pid}",
                code="pid-taken",
            )
        for number in set(self.others) - set(wanted):
            self._end_thread(self.others.pop(number))
        missing = sorted(set(wanted[1:]) - set(self.others))
        if missing and self._numbers is None:
            self._numbers = PidNumbers(self.pid, wanted)
        for first, count in _consecutive(missing):
            self._make_consecutive(first, count)
        # Its end takes milliseconds: not in the freeze, where seldom a thread is missing still.
        self.close()

    def _make_consecutive(self, first: int, count: int) -> None:
        assert self._numbers is not None
        self._numbers.set_next(first)
        calls = [(SYS.clone, threads.CLONE_THREAD_FLAGS, self.remote.stack_top, 0, 0, 0)] * count
        self.remote.new_tids.clear()
        made = self.remote.batch(calls)
        tracees = [Tracee(Tid(tid), Pid(self.pid)) for tid in self.remote.new_tids]
        for number, tracee in zip(made, tracees, strict=True):
            tracee.wait_stop()
            tracee.save()
            self.others[number] = tracee
        expected = list(range(first, first + count))
        if made != expected:
            raise UnsupportedError(
                f"thread numbers {expected} are not free in the container here, it gave {made}", code="pid-taken"
            )

    def _end_thread(self, tracee: Tracee) -> None:
        call = current().prepare_syscall(tracee.saved, self.remote.syscall_address, SYS.exit, [0])
        tracee.set_registers(call)
        ptrace.cont(tracee.tid)
        while not ptrace.wait(tracee.tid).is_gone:
            ptrace.cont(tracee.tid)

    def threads(self, wanted: Sequence[int]) -> list[Tracee]:
        """The leader and the others, in the order of `wanted`. Raises: RemoteProtocolError: others were made."""
        if set(wanted[1:]) != set(self.others) or wanted[:1] != [self.container_pid]:
            raise RemoteProtocolError(f"state of threads {wanted}, but {sorted(self.others)} were made")
        return [self.leader, *(self.others[number] for number in wanted[1:])]

    # ------------------------------------------------------------ helpers

    def _plan(self, size_bytes: int) -> CallPlan:
        self.remote.reset()
        return CallPlan(self.remote.reserve(size_bytes), size_bytes)

    def _run_plan(self, plan: CallPlan) -> None:
        if not len(plan):
            return
        if plan.has_placed:
            process_vm_write(self.pid, plan.base, plan.memory)
        results = self.remote.batch(plan.calls, keep_going=True)
        size = len(plan.memory)
        plan.load(results, process_vm_read(self.pid, plan.base, size) if size else b"")

    def close(self) -> None:
        """End the helper; the tasks are the caller's. Idempotent."""
        if self._numbers is not None:
            self._numbers.close()
            self._numbers = None

    @property
    def own_pids(self) -> list[int]:
        """As the container sees them."""
        return [self.container_pid]


def _consecutive(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of runs in ascending numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][0] + runs[-1][1] == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def _with_room_before(ranges: Sequence[tuple[int, int]]) -> list[procfs.MemoryArea]:
    """Ranges as areas to avoid, each with room before it for the vDSO, which goes behind the scratch."""
    return [
        procfs.MemoryArea(max(0, start - _VDSO_ROOM_BYTES), end, "---p", 0, 0, 0, "") for start, end in sorted(ranges)
    ]
