"""Memory areas of a process: what is mapped where, and what changes between two looks.

Contents travel as pages, by the stream. Here are the areas: read on the source, made again on the target by
differences only, so that pages that are there stay.

Survives: private anonymous memory, heap, stacks, private file mappings with their changed pages, shared anonymous
memory, read-only shared file mappings, protections, madvise hints, locked areas, names.
Does not survive: shared writable file mappings (unless the storage is shared), huge pages of hugetlbfs, memfd and
System V shared memory, AIO rings, io_uring rings, mappings of devices, uprobes (all refused).
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from agent.kernel.procfs import MemoryArea, read_maps, read_vm_flags
from protocol.messages import Record, Refusal

# asm-generic/mman-common.h
PROT_READ = 1
PROT_WRITE = 2
PROT_EXEC = 4
PROT_FILL = PROT_READ | PROT_WRITE
PAGE_BYTES = 4096
# The end of user addresses of any machine that is known here.
MAX_ADDRESS = 1 << 56
_SHARED_ANONYMOUS = "/dev/zero"
_NO_FLAGS: frozenset[str] = frozenset()
# VmFlags of smaps that can be asked for again, see `advice_calls` in layout.py.   Source: proc_pid_smaps(5).
_FLAGS_KEPT = frozenset({"dc", "wf", "dd", "hg", "nh", "mg", "sr", "rr", "lo"})
_FLAG_HUGETLB = "ht"
_FLAG_IO = "io"
_FLAG_UFFD = frozenset({"um"})

Address = Annotated[int, msgspec.Meta(ge=0, le=MAX_ADDRESS)]


class AreaKind(enum.Enum):
    """What is behind an area."""

    ANONYMOUS = "anonymous"
    SHARED = "shared"  # anonymous, MAP_SHARED
    FILE = "file"


class Area(Record, frozen=True, kw_only=True):
    """One mapping, `start` to `end` (exclusive)."""

    start: Address
    end: Address
    prot: Annotated[int, msgspec.Meta(ge=0, le=7)]
    kind: AreaKind
    shared: bool = False
    grows_down: bool = False
    no_reserve: bool = False
    path: str = ""  # inside the container
    offset: int = 0
    flags: tuple[str, ...] = ()  # two-letter VmFlags
    name: str = ""  # of an anonymous area, by PR_SET_VMA_ANON_NAME

    @property
    def size_bytes(self) -> int:
        """Its length."""
        return self.end - self.start

    @property
    def identity(self) -> tuple[object, ...]:
        """What decides whether the pages of a range are still those of the same mapping.

        Hints are no part of it: they are read later than the areas, and a range must not be mapped anew for them.
        """
        base = self.offset - self.start if self.kind is AreaKind.FILE else 0
        return self.kind, self.shared, self.path, base

    @property
    def is_tracked(self) -> bool:
        """Whether its pages travel: a shared file mapping's pages are the file's."""
        return not (self.kind is AreaKind.FILE and self.shared)

    @property
    def filling_prot(self) -> int:
        """Its protection from its making until `ProtectSection` says otherwise.

        Pages are written into it, so it is writable. A reserve of address space (PROT_NONE) stays as it is: making
        100 GB of it writable would be charged against the host's commit limit.
        """
        if not self.is_tracked:
            return self.prot
        return PROT_FILL if self.prot else 0


def areas_of(lines: Iterable[MemoryArea], flags: dict[int, frozenset[str]]) -> list[Area]:
    """The areas that travel. One that is not in `flags` has appeared since: its hints are those of no madvise."""
    areas = []
    for line in lines:
        if line.is_kernel_page:
            continue
        letters = flags.get(line.start, _NO_FLAGS)
        kind = _kind_of(line)
        name = line.path[6:-1] if line.path.startswith("[anon:") else ""
        areas.append(
            Area(
                start=line.start, end=line.end, prot=line.protection, kind=kind, shared=line.is_shared,
                grows_down="gd" in letters or line.path == "[stack]",
                no_reserve="nr" in letters,
                path=line.path if kind is AreaKind.FILE else "", offset=line.offset if kind is AreaKind.FILE else 0,
                flags=tuple(sorted(letters & _FLAGS_KEPT)), name=name,
            )
        )  # fmt: skip
    return areas


def _kind_of(line: MemoryArea) -> AreaKind:
    if _is_shared_anonymous(line):
        return AreaKind.SHARED
    if line.path.startswith("/") and line.inode:
        return AreaKind.FILE
    return AreaKind.ANONYMOUS


def is_tracked(line: MemoryArea) -> bool:
    """Whether its pages travel: those of a shared file mapping are the file's."""
    return not line.is_kernel_page and not (line.is_file and line.is_shared and not _is_shared_anonymous(line))


def _is_shared_anonymous(line: MemoryArea) -> bool:
    return line.path == _SHARED_ANONYMOUS and line.is_shared and line.deleted


# ---------------------------------------------------------------- check


_MEMFD = re.compile(r"^/(memfd:|SYSV[0-9a-f]{8})")


def check(pid: int, container_pid: int, *, storage: str) -> list[Refusal]:
    """Refuse areas that cannot be made again or whose contents would not travel."""
    lines = read_maps(pid)
    flags = read_vm_flags(pid)
    refusals = []
    for line in lines:
        reason = _reason_against(line, flags.get(line.start, _NO_FLAGS), storage)
        if reason is not None:
            code, text, hint = reason
            shown = line.path or "anonymous memory"
            refusals.append(
                Refusal(
                    code=code, pid=container_pid, object=f"{line.start:x}-{line.end:x} {shown}", hint=hint,
                    message=f"process {container_pid} has mapped {shown} at {line.start:x}: {text}",
                )
            )  # fmt: skip
    return refusals


def _reason_against(  # noqa: C901 - a table of reasons
    line: MemoryArea, flags: frozenset[str], storage: str
) -> tuple[str, str, str] | None:
    path = line.path
    if path.startswith("/[aio]"):
        return "aio", "asynchronous I/O (io_setup) cannot be moved", "turn native AIO off in the program"
    if "[io_uring]" in path:
        return "io-uring", "io_uring cannot be moved", "turn io_uring off in the program"
    if _FLAG_HUGETLB in flags or path.startswith("/anon_hugepage"):
        return "hugetlb", "huge pages of hugetlbfs are not carried", "use transparent huge pages"
    if _FLAG_UFFD & flags:
        return "userfaultfd", "the program handles its own page faults (userfaultfd)", ""
    if _MEMFD.match(path):
        return "shared-memory", "memory files (memfd, System V) are not carried yet", ""
    if path == "[uprobes]":
        return "uprobes", "a probe is set in the program", "end the tracing tool"
    if path.startswith("[") or not path:
        return None
    if _is_shared_anonymous(line):
        return None
    if not path.startswith("/") or _FLAG_IO in flags:
        return "special-mapping", "memory of a device or of the kernel cannot be moved", ""
    if line.deleted:
        return (
            "deleted-file", "the file was deleted or replaced since it was mapped",
            "restart the container, so that it maps what is on disk",
        )  # fmt: skip
    if line.is_shared and line.protection & PROT_WRITE and storage != "shared":
        return (
            "shared-file-mapping", "a shared writable mapping of a file: its changes would stay on the source",
            "use storage that both hosts share, and --storage shared",
        )  # fmt: skip
    return None


# ---------------------------------------------------------------- differences


@dataclass(frozen=True, slots=True)
class Changes:
    """What turns one list of areas into another."""

    unmap: list[tuple[int, int]]
    make: list[Area]


def changes(old: Sequence[Area], new: Sequence[Area]) -> Changes:
    """Ranges to unmap and areas to map over what is there; where nothing changed nothing is touched.

    Protections and hints are no part of it. Both lists are in ascending order.
    """
    if list(old) == list(new):
        return Changes([], [])
    points = sorted({edge for area in itertools.chain(old, new) for edge in (area.start, area.end)})
    unmap: list[tuple[int, int]] = []
    make: list[Area] = []
    old_at, new_at = _Cursor(old), _Cursor(new)
    for start, end in itertools.pairwise(points):
        was, wanted = old_at.find(start), new_at.find(start)
        if wanted is None:
            if was is not None:
                if unmap and unmap[-1][1] == start:
                    unmap[-1] = (unmap[-1][0], end)
                else:
                    unmap.append((start, end))
            continue
        if was is not None and was.identity == wanted.identity:
            continue
        piece = _cut(wanted, start, end)
        if make and make[-1].end == start and _touches(make[-1], piece):
            make[-1] = msgspec.structs.replace(make[-1], end=end)
        else:
            make.append(piece)
    return Changes(unmap, make)


def _touches(left: Area, right: Area) -> bool:
    """Whether one mmap may make both."""
    return _making(left) == _making(right)


def _making(area: Area) -> tuple[object, ...]:
    return area.identity, area.filling_prot, area.grows_down, area.no_reserve


def _cut(area: Area, start: int, end: int) -> Area:
    offset = area.offset + start - area.start if area.kind is AreaKind.FILE else 0
    return msgspec.structs.replace(area, start=start, end=end, offset=offset)


class _Cursor:
    """Finds the area at ascending addresses."""

    def __init__(self, areas: Sequence[Area]) -> None:
        self._areas = areas
        self._index = 0

    def find(self, address: int) -> Area | None:
        """The area that `address` is in. Addresses must not go down."""
        while self._index < len(self._areas) and self._areas[self._index].end <= address:
            self._index += 1
        if self._index < len(self._areas) and self._areas[self._index].start <= address:
            return self._areas[self._index]
        return None
