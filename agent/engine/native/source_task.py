"""One process of the source while it is copied: its tracker, its areas, and what of them the target has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agent.arch import current
from agent.engine import base
from agent.engine.native import sections
from agent.engine.native.closed_areas import ClosedAreas
from agent.engine.native.source_layout import SourceLayout
from agent.engine.native.tasks import credentials, vdso
from agent.engine.native.tasks.memory import Area, AreaKind
from agent.engine.tracking.base import Run
from agent.engine.tracking.pagemap_scan import PagemapScanTracker
from agent.kernel import pidfd, procfs
from agent.kernel.types import Fd

# One message to the stream is bounded, so that it can begin to send before a large scan is told to the end.
_RUNS_A_MESSAGE = 8192
# All sections pass the codec's limits; a large list of holes is cut.
_HOLES_A_SECTION = 65536


@dataclass(frozen=True, slots=True)
class Found:
    """What a scan has found, cut by what is behind the areas."""

    ranges: list[Run]
    dropped: list[Run]
    _segments: list[tuple[int, int, bool]]

    @property
    def dirty_bytes(self) -> int:
        """Pages to send."""
        return sum(end - start for start, end in self.ranges)

    def reads(self, task: int, *, final: bool) -> Iterator[base.ReadRuns]:
        """For the stream."""
        for anonymous in (True, False):
            runs = list(_intersect(self.ranges, self._segments, anonymous))
            for first in range(0, len(runs), _RUNS_A_MESSAGE):
                part = runs[first : first + _RUNS_A_MESSAGE]
                yield base.ReadRuns(
                    task=task, starts=[start for start, _ in part], sizes=[end - start for start, end in part],
                    anonymous=anonymous, final=final,
                )  # fmt: skip

    def holes(self, task: int) -> list[sections.Section]:
        """For the target."""
        return [
            sections.HolesSection(
                task=task, starts=[start for start, _ in part], sizes=[end - start for start, end in part]
            )
            for part in (
                self.dropped[first : first + _HOLES_A_SECTION]
                for first in range(0, len(self.dropped), _HOLES_A_SECTION)
            )
        ]


def _segments_of(areas: Sequence[Area]) -> list[tuple[int, int, bool]]:
    """(start, end, private anonymous) with neighbours of one kind joined."""
    segments: list[tuple[int, int, bool]] = []
    for area in areas:
        anonymous = area.kind is AreaKind.ANONYMOUS
        if segments and segments[-1][1] == area.start and segments[-1][2] == anonymous:
            segments[-1] = (segments[-1][0], area.end, anonymous)
        else:
            segments.append((area.start, area.end, anonymous))
    return segments


def _intersect(runs: Sequence[Run], segments: Sequence[tuple[int, int, bool]], anonymous: bool) -> Iterator[Run]:
    at = 0
    for start, end in runs:
        while at < len(segments) and segments[at][1] <= start:
            at += 1
        index = at
        while index < len(segments) and segments[index][0] < end:
            if segments[index][2] == anonymous:
                yield max(start, segments[index][0]), min(end, segments[index][1])
            index += 1


class SourceTask:
    """Opened once; `close` ends the tracking. Raises (all methods): TaskGoneError, KernelError."""

    def __init__(self, pid: int, number: int, *, tcp: str, storage: str) -> None:
        self.pid = pid
        self.number = number
        self.tcp = tcp
        self.storage = storage
        self.start_time = procfs.read_start_time(pid)
        self.pidfd = pidfd.pidfd_open(pid)
        self.layout = SourceLayout(pid, number)
        self._tracker = PagemapScanTracker()
        self._closed = ClosedAreas(pid)
        self._is_scanned = False

    @property
    def is_copied(self) -> bool:
        """Whether a round has gone before: not so when all is copied in the freeze."""
        return self._is_scanned

    def close(self) -> None:
        """Idempotent."""
        self._tracker.close()
        self._closed.close()
        self.layout.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = Fd(-1)

    def arm(self) -> float:
        """Begin to track; for how many ms the process stood. Raises: UnsupportedError: the kernel cannot."""
        self._tracker.arm(self.pid)
        return self._tracker.stop_ms

    def opened(self) -> base.OpenTask:
        """For the stream."""
        return base.OpenTask(task=self.number, pid=self.pid, start_time=self.start_time)

    def begin(self) -> sections.BeginSection:
        """For the target, first of all."""
        return sections.BeginSection(
            version=sections.VERSION, task=self.number, architecture=current().name,
            exe=procfs.read_link(f"/proc/{self.pid}/exe"),
            vdso=vdso.find(self.pid, procfs.read_maps(self.pid)),
            seccomp=credentials.seccomp_of_status(procfs.read_proc(f"/proc/{self.pid}/status")),
        )  # fmt: skip

    def scan(self) -> Found:
        """What has changed since the last scan; watched afresh."""
        scan = self._tracker.scan_round(self.layout.tracked)
        closed, emptied = self._closed.scan(self.layout.closed)
        # In the first round the target has nothing yet that could be dropped.
        dropped = [*scan.holes, *emptied] if self._is_scanned else []
        self._is_scanned = True
        return Found(sorted([*scan.copy, *closed]), dropped, _segments_of(self.layout.areas))

    def scan_final(self) -> Found:
        """What has changed, in the freeze; after a roll-back it will be found again."""
        if not self._is_scanned:
            # Nothing was ever copied: the slow scan, which tells what is there from what never was.
            return self.scan()
        closed, emptied = self._closed.scan(self.layout.closed)
        written = self._tracker.scan_final(self.layout.tracked)
        return Found(sorted([*written, *closed]), emptied, _segments_of(self.layout.areas))

    def dirty_bytes(self) -> int:
        """What would have to be sent now."""
        self.layout.look(in_freeze=True)
        return sum(end - start for start, end in self._tracker.scan_final(self.layout.tracked))
