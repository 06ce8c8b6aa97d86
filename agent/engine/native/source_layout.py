"""The source's picture of the target's address space: what to send so that it becomes that of the source."""

from __future__ import annotations

from collections.abc import Sequence

from agent.engine.native import sections
from agent.engine.native.protections import Protections
from agent.engine.native.tasks import memory
from agent.engine.native.tasks.memory import Area
from agent.engine.native.tasks.procfile import ProcFile
from agent.kernel.procfs import MemoryArea, parse_maps, read_vm_flags


class SourceLayout:
    """Areas of one task as last looked at, and what the target has of them.

    Raises (all looks): TaskGoneError, KernelError.
    """

    def __init__(self, pid: int, task: int) -> None:
        self._pid = pid
        self._task = task
        self._maps = ProcFile(f"/proc/{pid}/maps")
        self._text = b""
        self._flags: dict[int, frozenset[str]] = {}
        self._sent: list[Area] = []
        self._there = Protections()
        self.areas: list[Area] = []
        self.lines: list[MemoryArea] = []  # all of them, the kernel's too
        self.tracked: list[MemoryArea] = []
        self.closed: list[MemoryArea] = []  # PROT_NONE: reserves of address space, guards, memory put away

    def close(self) -> None:
        """Idempotent."""
        self._maps.close()

    def look(self, *, in_freeze: bool = False) -> None:
        """Read the areas. Hints (madvise, no reserve) walk the page tables: they are read only outside the freeze."""
        text = self._maps.read()
        if text == self._text:
            return
        lines = parse_maps(text)
        self._flags = _carried_over(self._flags, self.areas, lines) if in_freeze else read_vm_flags(self._pid)
        self._text = text
        self.areas = memory.areas_of(lines, self._flags)
        self.lines = lines
        travelling = [line for line in lines if memory.is_tracked(line)]
        self.tracked = [line for line in travelling if line.protection]
        self.closed = [line for line in travelling if not line.protection]

    def changed(self) -> list[sections.Section]:
        """What the target has to map and unmap."""
        if self.areas == self._sent:
            return []
        difference = memory.changes(self._sent, self.areas)
        for start, end in difference.unmap:
            self._there.paint(start, end, None)
        for area in difference.make:
            self._there.paint(area.start, area.end, area.filling_prot)
        self._sent = self.areas
        return [sections.LayoutSection(task=self._task, areas=self.areas)]

    def opened_for(self, runs: Sequence[tuple[int, int]]) -> list[sections.Section]:
        """Make writable what is not and gets one of the ascending `runs` of (start, end)."""
        closed = self._there.around(runs, memory.PROT_WRITE)
        return self._protect([(start, end, memory.PROT_FILL) for start, end, _ in closed])

    def finished(self) -> list[sections.Section]:
        """Give every area the protection that it has on the source."""
        wrong = [
            (start, end, area.prot)
            for area in self.areas
            for start, end, prot in self._there.pieces(area.start, area.end)
            if prot != area.prot
        ]
        return self._protect(wrong)

    def _protect(self, wanted: Sequence[tuple[int, int, int]]) -> list[sections.Section]:
        if not wanted:
            return []
        for start, end, prot in wanted:
            self._there.paint(start, end, prot)
        return [
            sections.ProtectSection(
                task=self._task, starts=[start for start, _, _ in wanted],
                sizes=[end - start for start, end, _ in wanted], prots=[prot for _, _, prot in wanted],
            )
        ]  # fmt: skip


def _carried_over(
    flags: dict[int, frozenset[str]], areas: Sequence[Area], lines: Sequence[MemoryArea]
) -> dict[int, frozenset[str]]:
    """Hints for areas that were not there at the last full look.

    One that was cut out of, or grew from, an area keeps its hints; a new one has none. (A madvise that cut it out is
    seen at the next full look; in the freeze there is none, and a hint is lost, never a page.)
    """
    found = {}
    at = 0
    for line in lines:
        if line.start in flags:
            found[line.start] = flags[line.start]
            continue
        while at < len(areas) and areas[at].end <= line.start:
            at += 1
        if at < len(areas) and areas[at].start < line.end:
            found[line.start] = flags.get(areas[at].start, frozenset())
    return found
