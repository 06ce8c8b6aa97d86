"""What the project set out to reach, against what was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.downtime.records import Cell, growth_of

_GAP_WITHIN_MS = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """A wish, what was seen, and whether that meets it."""

    wish: str
    seen: str
    is_met: bool


def compare(cells: Sequence[Cell]) -> list[Target]:
    """Each target of the project. By medians; of several sizes the worst counts."""
    plain = [cell for cell in cells if cell.link == "none"]
    idle = [cell for cell in plain if not cell.dirty_mb_per_s]
    dirty = [cell for cell in plain if cell.dirty_mb_per_s]
    found = [
        _downtime("idle, unshaped, any size: first under 30 ms", idle, 30.0),
        _downtime("idle, unshaped, any size: then under 20 ms", idle, 20.0),
        _downtime("20 MB/s dirtied, unshaped, any size: under 40 ms", dirty, 40.0),
        _gap(plain),
        _growth(idle),
        _throughput(idle),
    ]
    return [target for target in found if target is not None]


def _downtime(wish: str, cells: Sequence[Cell], limit_ms: float) -> Target | None:
    if not cells:
        return None
    medians = [cell.spread(lambda run: run.downtime_ms).median for cell in cells]
    each = ", ".join(f"{cell.size_mb} MB {median:.1f}" for cell, median in zip(cells, medians, strict=True))
    return Target(f"median downtime, {wish}", f"{each} ms", max(medians) < limit_ms)


def _gap(cells: Sequence[Cell]) -> Target | None:
    runs = [run for cell in cells for run in cell.runs]
    if not runs:
        return None
    medians = [cell.spread(lambda run: abs(run.gap_ms - run.downtime_ms)).median for cell in cells]
    within = sum(abs(run.gap_ms - run.downtime_ms) <= _GAP_WITHIN_MS for run in runs)
    seen = f"{max(medians):.1f} ms at worst (median of a row); {within} of {len(runs)} unshaped runs within"
    return Target("client's gap within 5 ms of the downtime", seen, max(medians) <= _GAP_WITHIN_MS)


def _growth(cells: Sequence[Cell]) -> Target | None:
    slope = growth_of(cells, lambda run: run.downtime_ms)
    if slope is None:
        return None
    return Target("growth with memory under 12 ms per GB", f"{slope:.1f} ms per GB", slope < 12.0)


def _throughput(cells: Sequence[Cell]) -> Target | None:
    if not cells:
        return None
    largest = max(cells, key=lambda cell: cell.size_mb)
    rate = largest.spread(lambda run: run.first_round_mb_per_s)
    seen = f"{rate.median:.0f} MB/s ({rate.least:.0f}-{rate.most:.0f}), first round of {largest.size_mb} MB"
    return Target("300 MB/s of incompressible memory over one stream", seen, rate.median >= 300.0)
