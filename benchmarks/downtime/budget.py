"""The budget of the freeze: the source's parts, and within its waiting what the target and the way there took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.downtime.records import (
    COMMIT_PARTS,
    WAITS_FOR_RESTORED,
    WAITS_FOR_RUNNING,
    Cell,
    Run,
    Spread,
    part,
    part_names,
    target_part_names,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the budget; `inside`: a part of the line of the source above it."""

    name: str
    inside: bool
    spread: Spread


def budget(cell: Cell) -> list[Line]:
    """Medians of each part, in the order they happen. The lines that are not `inside` add up to the downtime."""
    lines = []
    target_names = target_part_names([cell])
    of_commit = [name for name in target_names if name in COMMIT_PARTS]
    of_restore = [name for name in target_names if name not in COMMIT_PARTS]
    for name in part_names([cell]):
        lines.append(Line(name, inside=False, spread=cell.spread(part(name))))
        if name == WAITS_FOR_RESTORED:
            lines += _inside(cell, name, of_restore, "rest: pages, link, processes taking turns")
        if name == WAITS_FOR_RUNNING:
            lines += _inside(cell, name, of_commit, "rest: the round trip between the agents")
    return lines


def _inside(cell: Cell, waiting: str, names: Sequence[str], rest: str) -> list[Line]:
    lines = [Line(n, inside=True, spread=cell.spread(part(n))) for n in names]

    def left(run: Run) -> float:
        return run.parts[waiting] - sum(run.target_parts.get(name, 0.0) for name in names)

    return [*lines, Line(rest, inside=True, spread=cell.spread(left))]
