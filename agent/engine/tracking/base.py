"""The small interface behind which dirty pages are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agent.kernel.procfs import MemoryArea

Run = tuple[int, int]  # start and end address of whole pages


@dataclass(frozen=True, slots=True)
class Scan:
    """What changed since the scan before, in address order.

    `copy`: pages to send. `holes`: pages that read as zero or as their file again and are to be dropped.
    `untracked`: areas that cannot be watched (read-only shared mappings, droppable memory): their writes are not seen.
    """

    copy: list[Run] = field(default_factory=list)
    holes: list[Run] = field(default_factory=list)
    untracked: list[MemoryArea] = field(default_factory=list)


class DirtyTracker(Protocol):
    """Of one process. `scan_*` take the areas of interest in address order; kernel pages (vDSO) are passed over."""

    stop_ms: float  # for how long `arm` stopped the process

    def arm(self, pid: int) -> None:
        """Begin to watch. The process is stopped for a moment and none of its system calls fails for it.

        Raises: UnsupportedError: this kernel cannot. TaskGoneError. KernelError.
        """
        ...

    def scan_round(self, areas: Sequence[MemoryArea]) -> Scan:
        """What changed; all that was seen is watched afresh. An area seen for the first time reads as changed.

        Raises: TaskGoneError: the process is gone or runs another program: start over with a new tracker.
        """
        ...

    def scan_final(self, areas: Sequence[MemoryArea]) -> list[Run]:
        """Pages to send, all threads being stopped. Nothing is watched afresh: after a roll-back the next round sees
        the same pages again.
        """
        ...

    def close(self) -> None:
        """Stop watching. Idempotent."""
        ...
