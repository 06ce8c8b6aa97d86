"""Making memory areas in a process: the calls that map, unmap, hint, lock and drop. See memory.py for the records."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

from agent.engine.native.tasks.memory import Area, AreaKind, Changes
from agent.engine.native.tasks.plan import Answer, CallPlan
from agent.kernel.process import PR_SET_VMA_ANON_NAME, Prctl
from agent.kernel.unistd import SYS

# asm-generic/mman-common.h, asm-generic/mman.h, linux/mman.h
MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_GROWSDOWN = 0x0100
MAP_NORESERVE = 0x4000
MADV_RANDOM = 1
MADV_SEQUENTIAL = 2
MADV_DONTNEED = 4
MADV_REMOVE = 9
MADV_DONTFORK = 10
MADV_DOFORK = 11
MADV_MERGEABLE = 12
MADV_UNMERGEABLE = 13
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_DONTDUMP = 16
MADV_DODUMP = 17
MADV_WIPEONFORK = 18
MADV_KEEPONFORK = 19
_NO_FILE = -1
_AT_FDCWD = -100
_MAX_NAME_BYTES = 80

# Letter in VmFlags -> (madvise that sets it, madvise that takes it back or None).   Source: proc_pid_smaps(5).
_ADVICE: dict[str, tuple[int, int | None]] = {
    "rr": (MADV_RANDOM, None),
    "sr": (MADV_SEQUENTIAL, None),
    "dc": (MADV_DONTFORK, MADV_DOFORK),
    "dd": (MADV_DONTDUMP, MADV_DODUMP),
    "wf": (MADV_WIPEONFORK, MADV_KEEPONFORK),
    "hg": (MADV_HUGEPAGE, None),
    "nh": (MADV_NOHUGEPAGE, None),
    "mg": (MADV_MERGEABLE, MADV_UNMERGEABLE),
}
LOCKED = "lo"


def calls_for_unmapping(difference: Changes) -> list[tuple[int, ...]]:
    """munmap of what is gone."""
    return [(SYS.munmap, start, end - start) for start, end in difference.unmap]


def plan_opening(areas: Sequence[Area], plan: CallPlan) -> Callable[[], dict[tuple[str, bool], int]]:
    """Open the files of areas, by the process itself: its own root and its own rights decide what it finds.

    Gives the numbers by (path, writable), once the plan has run.
    """
    answers: dict[tuple[str, bool], Answer] = {}
    for area in areas:
        key = _file_key(area)
        if area.kind is AreaKind.FILE and key not in answers:
            flags = os.O_CLOEXEC | (os.O_RDWR if key[1] else os.O_RDONLY)
            path = plan.place(os.fsencode(area.path) + b"\0")
            answers[key] = plan.must(f"openat({area.path})", SYS.openat, _AT_FDCWD, path, flags, 0)
    return lambda: {key: answer.value for key, answer in answers.items()}


def _file_key(area: Area) -> tuple[str, bool]:
    """Only a shared mapping that may be written needs the file open for writing."""
    return area.path, area.shared and bool(area.prot & 2)


def plan_mapping(areas: Sequence[Area], files: dict[tuple[str, bool], int], plan: CallPlan) -> None:
    """Map areas over whatever is there, and close the files."""
    for area in areas:
        flags = MAP_FIXED | (MAP_SHARED if area.shared else MAP_PRIVATE)
        if area.grows_down:
            flags |= MAP_GROWSDOWN
        if area.no_reserve:
            flags |= MAP_NORESERVE
        number = _NO_FILE
        if area.kind is AreaKind.FILE:
            number = files[_file_key(area)]
        else:
            flags |= MAP_ANONYMOUS
        plan.must(
            f"mmap({area.path or area.kind.value})", SYS.mmap, area.start, area.size_bytes, area.filling_prot, flags,
            number, area.offset,
        )  # fmt: skip
    for number in files.values():
        plan.must("close", SYS.close, number)


def hints(old: Sequence[Area], difference: Changes, new: Sequence[Area]) -> list[tuple[Area, frozenset[str]]]:
    """Areas whose hints are not what the target has, with those that it has."""
    if not any(area.flags or area.name for area in (*old, *new)):
        return []
    before = {(area.start, area.end): area for area in old}
    made = [(area.start, area.end) for area in difference.make]
    starts = [start for start, _ in made]
    wrong = []
    for area in new:
        known = before.get((area.start, area.end))
        index = bisect_right(starts, area.end - 1) - 1
        is_new = index >= 0 and made[index][1] > area.start
        there = frozenset() if known is None or is_new else frozenset(known.flags)
        if there != frozenset(area.flags) or (area.name and (is_new or known is None or known.name != area.name)):
            wrong.append((area, there))
    return wrong


def plan_hints(wrong: Sequence[tuple[Area, frozenset[str]]], plan: CallPlan) -> None:
    """Hints are hints: a kernel that was built without one refuses it, and nothing is lost."""
    for area, there in wrong:
        for letter, (on, off) in _ADVICE.items():
            if letter in area.flags and letter not in there:
                plan.call(f"madvise({letter})", SYS.madvise, area.start, area.size_bytes, on)
            elif letter in there and letter not in area.flags and off is not None:
                plan.call(f"madvise(not {letter})", SYS.madvise, area.start, area.size_bytes, off)
        if area.name:
            name = plan.place(os.fsencode(area.name)[: _MAX_NAME_BYTES - 1] + b"\0")
            plan.call(
                "prctl(PR_SET_VMA)", SYS.prctl, Prctl.SET_VMA, PR_SET_VMA_ANON_NAME, area.start, area.size_bytes, name
            )


def calls_for_locking(areas: Sequence[Area]) -> list[tuple[int, ...]]:
    """mlock of what is locked."""
    return [(SYS.mlock, area.start, area.size_bytes) for area in areas if LOCKED in area.flags]


def calls_for_dropping(areas: Sequence[Area], start: int, end: int) -> Iterator[tuple[int, ...]]:
    """Give back the pages of a range, which may reach over several areas.

    Pages of shared memory belong to the object: dropping them from the process alone would leave their contents.
    """
    index = max(0, bisect_right(areas, start, key=lambda area: area.start) - 1)
    while index < len(areas) and areas[index].start < end:
        area = areas[index]
        low, high = max(start, area.start), min(end, area.end)
        if low < high:
            advice = MADV_REMOVE if area.kind is AreaKind.SHARED else MADV_DONTNEED
            yield SYS.madvise, low, high - low, advice
        index += 1
