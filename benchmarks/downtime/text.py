"""The figures as plain text and as markdown: the same tables, drawn in two ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.downtime import budget as budgets
from benchmarks.downtime import targets
from benchmarks.downtime.machine import QUIET_LOAD
from benchmarks.downtime.records import (
    Cell,
    Machine,
    Report,
    Spread,
    TrackerCost,
    growth_by_part,
    growth_of,
)  # fmt: skip

_PROFILE_ROWS = 16
# Slopes below this are noise at a few runs a cell.
_LEAST_SLOPE = 0.2


@dataclass(frozen=True, slots=True)
class Table:
    """`rows` of text; the first column is set left, the others right. `note`: lines below."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def tables(report: Report) -> list[Table]:
    """All of them, in the order of the page."""
    cells = report.cells
    found = [_targets(cells), _downtime(cells), _client(cells), _traffic(cells)]
    found += [_budget(cell) for cell in _telling(cells)]
    found += _growth(cells)
    if report.tracker is not None:
        found.append(_tracker(report.tracker))
    taken = machine_line(report.profile_machine) if report.profile_machine else ""
    found += [_profile(side, rows, taken) for side, rows in report.profile.items()]
    return found


def _telling(cells: Sequence[Cell]) -> list[Cell]:
    """Cells whose budget is worth a table: unshaped; the smallest and the largest idle, and the largest dirtied."""
    plain = [cell for cell in cells if cell.link == "none"]
    idle = sorted((cell for cell in plain if not cell.dirty_mb_per_s), key=lambda cell: cell.size_mb)
    dirty = sorted((cell for cell in plain if cell.dirty_mb_per_s), key=lambda cell: cell.size_mb)
    chosen = [*idle[:1], *idle[1:][-1:], *dirty[-1:]]
    return chosen or list(cells[:1])


def _spread(spread: Spread, digits: int = 1) -> str:
    return f"{spread.median:.{digits}f} ({spread.least:.{digits}f}-{spread.most:.{digits}f})"


def _name(cell: Cell) -> str:
    load = f"{cell.dirty_mb_per_s} MB/s dirtied" if cell.dirty_mb_per_s else "idle"
    return f"{cell.size_mb} MB, {load}, {'unshaped' if cell.link == 'none' else cell.link}"


def _targets(cells: Sequence[Cell]) -> Table:
    rows = [[target.wish, target.seen, "yes" if target.is_met else "no"] for target in targets.compare(cells)]
    return Table("Targets", ["target", "seen", "met"], rows, "By medians; of several sizes the worst counts.")


def _downtime(cells: Sequence[Cell]) -> Table:
    rows = [
        [_name(cell), str(len(cell.runs)), _spread(cell.spread(lambda run: run.downtime_ms)),
         _spread(cell.spread(lambda run: run.gap_ms)), _spread(cell.spread(lambda run: run.gap_ms - run.downtime_ms)),
         _spread(cell.spread(lambda run: run.late_send_ms)), f"{cell.quiet.gap_ms:.1f}"]
        for cell in cells
    ]  # fmt: skip
    head = ["redis", "runs", "downtime, ms", "client's gap, ms", "gap - downtime", "sent late", "gap, no migration"]
    failed = [f"{_name(cell)}: {text}" for cell in cells for text in cell.failures]
    return Table(
        "Downtime", head, rows,
        "Median (least-most). 'Sent late': the client's own delay at worst, anywhere in the run; a gap is only as "
        "exact as that. 'Gap, no migration': its longest wait while nothing moved, in "
        f"{cells[0].quiet.seconds:.0f} s of the same session." + "".join(f"\nFailed: {text}" for text in failed),
    )  # fmt: skip


def _client(cells: Sequence[Cell]) -> Table:
    rows = [
        [_name(cell), _spread(cell.spread(lambda run: run.other_gap_ms)),
         _spread(cell.spread(lambda run: run.packets_caught), 0), f"{cell.quiet.p99_ms:.1f}",
         f"{cell.quiet.late_send_ms:.1f}"]
        for cell in cells
    ]  # fmt: skip
    return Table(
        "The client outside of the freeze", ["redis", "longest other wait, ms", "frames caught", "quiet: p99", "late"],
        rows,
        "Other waits: while preparing, in the rounds (the pages share link and processors with the client), after.",
    )  # fmt: skip


def _traffic(cells: Sequence[Cell]) -> Table:
    rows = [
        [_name(cell), f"{cell.spread(lambda run: run.memory_bytes).median / 1e6:.0f}",
         f"{cell.spread(lambda run: run.wire_bytes).median / 1e6:.0f}",
         f"{cell.spread(lambda run: run.wire_bytes / run.memory_bytes).median:.2f}",
         _spread(cell.spread(lambda run: run.rounds), 0),
         f"{cell.spread(lambda run: run.before_freeze_ms).median:.0f}",
         _spread(cell.spread(lambda run: run.dirty_bytes / 1e6), 2),
         _spread(cell.spread(lambda run: run.total_ms / 1e3), 2),
         f"{cell.spread(lambda run: run.setup_ms / 1e3).median:.2f}",
         _spread(cell.spread(lambda run: run.first_round_mb_per_s), 0)]
        for cell in cells
    ]  # fmt: skip
    head = [
        "redis",
        "memory, MB",
        "wire, MB",
        "wire/memory",
        "rounds",
        "before the freeze, ms",
        "last scan, MB",
        "total, s",
        "set-up, s",
    ]
    return Table(
        "Bytes and time", [*head, "first round, MB/s"], rows,
        "The values are random: nothing to compress. 'Before the freeze': from the last round to it, the target making "
        "threads, files being looked up. 'Last scan': what was still to be sent in the freeze. The first round is all "
        "of the memory over one stream, SSH and both ends on these processors. Total: the whole command, with survey, "
        "set-up of the target and cleaning up.",
    )  # fmt: skip


def _budget(cell: Cell) -> Table:
    lines = budgets.budget(cell)
    rows = [[f"{'- within: ' if line.inside else ''}{line.name}", _spread(line.spread, 2)] for line in lines]
    rows.append(["downtime", _spread(cell.spread(lambda run: run.downtime_ms), 2)])
    note = "Medians of each line need not add up to the median of the sum. 'Within' lines are the target's clock."
    return Table(f"Budget of the freeze: {_name(cell)}", ["part", "ms"], rows, note)


def _growth(cells: Sequence[Cell]) -> list[Table]:
    found = []
    groups: dict[tuple[int, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.dirty_mb_per_s, cell.link), []).append(cell)
    rows = []
    for group in groups.values():
        slope = growth_of(group, lambda run: run.downtime_ms)
        if slope is not None:
            rows.append([_name(group[0]).partition(", ")[2], f"{slope:.1f}"])
    if rows:
        note = "Slope of a straight line through the medians of the sizes; GB are 10^9 bytes of the container's memory."
        found.append(Table("Growth of the downtime with memory", ["redis", "ms per GB"], rows, note))
    slopes = growth_by_part(groups.get((0, "none"), []))
    parts = [[name, f"{slope:.2f}"] for name, slope in slopes.items() if abs(slope) >= _LEAST_SLOPE]
    if parts:
        note = f"Idle, unshaped. Parts that grow by less than {_LEAST_SLOPE} ms per GB either way are left out."
        found.append(Table("What the growth is made of", ["part", "ms per GB"], parts, note))
    return found


def _tracker(cost: TrackerCost) -> Table:
    rows = [
        ["a write to a page, never armed, ns", _spread(cost.plain_ns, 0)],
        ["the first write to a page after arming, ns", _spread(cost.first_write_ns, 0)],
        ["the next write to that page, ns", _spread(cost.second_write_ns, 0)],
        ["arming: the process stops for, ms", _spread(cost.arm_stop_ms, 2)],
        ["scan of a round, every page written, ms", _spread(cost.scan_written_ms, 2)],
        ["scan of a round, none written, ms", _spread(cost.scan_clean_ms, 2)],
    ]
    note = f"One process that writes a byte to each of {cost.pages} pages ({cost.pages * 4096 / 1e6:.0f} MB) in a loop."
    return Table("What the tracker costs a process", ["", "median (least-most)"], rows, note)


def _profile(side: str, rows: Sequence[tuple[str, int, float, float]], taken: str) -> Table:
    shown = [[name, str(calls), f"{own:.2f}", f"{all_:.2f}"] for name, calls, own, all_ in rows[:_PROFILE_ROWS]]
    rest = sum(own for _, _, own, _ in rows[_PROFILE_ROWS:])
    shown.append([f"{len(rows) - _PROFILE_ROWS} others", "", f"{rest:.2f}", ""])
    shown.append(["together", "", f"{sum(own for _, _, own, _ in rows):.2f}", ""])
    note = f"Per migration. The profiler itself makes many small calls look dearer than they are. Taken: {taken}"
    title = f"Where the engine's time in the freeze goes: {side}"
    return Table(title, ["function", "calls", "own, ms", "with callees, ms"], shown, note)


def machine_line(m: Machine) -> str:
    """One sentence."""
    noisy = "" if m.load_before < QUIET_LOAD else ", which was NOT quiet"
    after = "the run did not get to its end" if m.load_after is None else f"{m.load_after:.2f} after, its own included"
    return (
        f"{m.date}, revision {m.revision}; {m.cores} processors ({m.cpu}), Linux {m.kernel}; "
        f"load average {m.load_before:.2f} before{noisy}; {after}."
    )


def plain(report: Report) -> str:
    """For a terminal."""
    blocks = [machine_line(report.machine)]
    for table in tables(report):
        lines = [table.head, *table.rows]
        widths = [max(len(row[column]) for row in lines) for column in range(len(table.head))]
        drawn = [
            "  ".join(text.ljust(width) if not column else text.rjust(width)
                      for column, (text, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in lines
        ]  # fmt: skip
        blocks.append("\n".join([table.title.upper(), *drawn, *([table.note] if table.note else [])]))
    return "\n\n".join(blocks)


def markdown(report: Report, *, heading: str = "###") -> str:
    """For docs/."""
    blocks = [machine_line(report.machine)]
    for table in tables(report):
        head = ["| " + " | ".join(table.head) + " |", "|---|" + "---:|" * (len(table.head) - 1)]
        drawn = ["| " + " | ".join(row) + " |" for row in table.rows]
        blocks.append(
            "\n".join([f"{heading} {table.title}", "", *head, *drawn, *(["", table.note] if table.note else [])])
        )
    return "\n\n".join(blocks)
