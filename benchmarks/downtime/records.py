"""What was measured, as it stands in the JSON file. Times in ms, sizes in bytes, MB and GB decimal; no I/O here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

import msgspec

# What the target does after COMMIT; everything else that it reports lies within the source's 'copy and restore'.
COMMIT_PARTS = ("target journal running", "target network up", "target sockets", "target thaw")
WAITS_FOR_RESTORED = "copy and restore"
WAITS_FOR_RUNNING = "commit"


class Spread(msgspec.Struct, frozen=True):
    """Of one figure over the runs of a cell."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One migration under load."""

    downtime_ms: float  # freeze to RUNNING, by the source's clock
    parts: dict[str, float]  # ms, the source's: their sum is the downtime
    target_parts: dict[str, float]  # ms, the target's, within the source's waiting
    gap_ms: float  # the client's longest wait for a reply in the cut-over
    other_gap_ms: float  # the longest outside of it, from the start of the command to 0.5 s after its end
    late_send_ms: float  # the client's own delay, at worst: how far its figures can be trusted
    rounds: int
    before_freeze_ms: float  # from when the cut-over was entered: what is dirtied meanwhile is sent in the freeze
    total_ms: float
    setup_ms: float
    memory_bytes: int
    wire_bytes: int
    dirty_bytes: int  # in the last scan
    first_round_mb_per_s: float
    packets_caught: int


class Quiet(msgspec.Struct, frozen=True, kw_only=True):
    """The client with nothing going on: what the machine alone does to it."""

    seconds: float
    gap_ms: float
    late_send_ms: float
    p99_ms: float


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one combination."""

    size_mb: int
    dirty_mb_per_s: int
    link: str  # "none": unshaped
    quiet: Quiet
    runs: list[Run]
    failures: list[str]

    def spread(self, figure: Callable[[Run], float]) -> Spread:
        """Of a figure over the runs, of which there must be one."""
        return Spread.of(figure(run) for run in self.runs)


class TrackerCost(msgspec.Struct, frozen=True, kw_only=True):
    """What the tracker costs a process that writes to each of its pages, over and over."""

    pages: int
    arm_stop_ms: Spread
    plain_ns: Spread  # a page written, never armed
    first_write_ns: Spread  # a page written for the first time after it was armed
    second_write_ns: Spread  # again, armed but already written
    scan_written_ms: Spread  # the round's scan when every page was written
    scan_clean_ms: Spread  # when none was


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where and on what."""

    date: str
    kernel: str
    cpu: str
    cores: int
    revision: str
    load_before: float
    load_after: float | None = None  # None: it was not run to its end


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one run of the benchmark."""

    machine: Machine
    cells: list[Cell]
    tracker: TrackerCost | None = None
    profile: dict[str, list[tuple[str, int, float, float]]] = {}  # side -> (function, calls, own ms, ms with callees)
    profile_machine: Machine | None = None  # when and on what the profile was taken


def longest_waits(gaps: Iterable[tuple[float, float]], begin_s: float, end_s: float) -> tuple[float, float]:
    """The longest wait (ms) that overlaps [begin_s, end_s], and the longest other. `gaps`: when due (s), ms."""
    inside, outside = 0.0, 0.0
    for at_s, ms in gaps:
        if at_s <= end_s and at_s + ms / 1e3 >= begin_s:
            inside = max(inside, ms)
        else:
            outside = max(outside, ms)
    return inside, outside


def growth_ms_per_gb(points: Sequence[tuple[float, float]]) -> float:
    """Slope of a straight line through (bytes, ms), in ms per 10^9 bytes."""
    line = statistics.linear_regression([size / 1e9 for size, _ in points], [ms for _, ms in points])
    return line.slope


def growth_by_part(cells: Sequence[Cell]) -> dict[str, float]:
    """Slope of each part of source and target over the cells' medians, ms per GB; {}: all of one size."""
    slopes: dict[str, float] = {}
    for name in (*part_names(cells), *target_part_names(cells)):
        slope = growth_of(cells, part(name))
        if slope is not None:
            slopes[name] = slope
    return slopes


def part(name: str) -> Callable[[Run], float]:
    """What gives a part's ms of a run, of source or target; 0: the run has no such part."""
    return lambda run: (run.parts | run.target_parts).get(name, 0.0)


def growth_of(cells: Sequence[Cell], figure: Callable[[Run], float]) -> float | None:
    """Slope of a figure over the cells' medians, ms per GB; None: all of one size."""
    if len({cell.size_mb for cell in cells}) < 2:
        return None
    points = [(cell.spread(lambda run: run.memory_bytes).median, cell.spread(figure).median) for cell in cells]
    return growth_ms_per_gb(points)


def part_names(cells: Sequence[Cell]) -> list[str]:
    """Names of all parts of the source, in the order they happen."""
    return list(dict.fromkeys(name for cell in cells for run in cell.runs for name in run.parts))


def target_part_names(cells: Sequence[Cell]) -> list[str]:
    """Names of all parts of the target, in the order they happen."""
    return list(dict.fromkeys(name for cell in cells for run in cell.runs for name in run.target_parts))
