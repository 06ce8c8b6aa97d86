"""Areas that nobody may touch (PROT_NONE): guards, reserves of address space, memory that was put away.

They are not armed: to watch pages that do not exist the kernel makes page tables for them, 2 GiB for a reserve of
1 TiB. Nor need they be: what is in them changes only while they are open, and then they are tracked. So their pages
are looked for each time; there are mostly none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from agent.engine.tracking.base import Run
from agent.kernel import pagemap
from agent.kernel.pagemap import Category
from agent.kernel.procfs import MemoryArea
from agent.kernel.types import Fd


class ClosedAreas:
    """Of one process. Raises (all methods): TaskGoneError, KernelError."""

    def __init__(self, pid: int) -> None:
        self._pagemap = pagemap.open_pagemap(pid)
        self._empty: set[Run] = set()  # the target has nothing there

    def close(self) -> None:
        """Idempotent."""
        if self._pagemap >= 0:
            os.close(self._pagemap)
            self._pagemap = Fd(-1)

    def scan(self, areas: Sequence[MemoryArea]) -> tuple[list[Run], list[Run]]:
        """Pages that are there, and ranges that are to be empty."""
        filled: list[Run] = []
        emptied: list[Run] = []
        empty: set[Run] = set()
        for area in areas:
            runs = self._present(area)
            filled += runs
            whole = (area.start, area.end)
            if not runs:
                empty.add(whole)
                if whole in self._empty:
                    continue
            at = area.start
            for start, end in runs:
                if at < start:
                    emptied.append((at, start))
                at = end
            if at < area.end:
                emptied.append((at, area.end))
        self._empty = empty
        return filled, emptied

    def _present(self, area: MemoryArea) -> list[Run]:
        # A private page of a file that is FILE is still the file's: it is there already.
        inverted = Category.FILE if area.is_file and not area.is_shared else Category.NONE
        regions = pagemap.scan(
            self._pagemap, area.start, area.end, inverted=inverted, mask=inverted,
            any_of=Category.PRESENT | Category.SWAPPED, returned=Category.PRESENT | Category.SWAPPED | Category.PFNZERO,
        )  # fmt: skip
        return [(start, end) for start, end, kinds in regions.tolist() if not kinds & Category.PFNZERO]
