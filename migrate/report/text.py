"""The summary for people: what moved, how long it stood, and what the freeze was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from migrate import units
from migrate.report.result import Problem, Result, Status
from protocol.messages import Refusal

_BAR_WIDTH = 40


def summary(result: Result) -> str:
    """A completed migration, in a few lines."""
    times = f"downtime {units.duration(result.downtime_ms)}, total {units.duration(result.total_ms)}"
    sizes = {
        "memory": units.size(result.memory_bytes),
        "sent": units.size(result.transferred_bytes),
        "on the wire": units.size(result.wire_bytes),
        "rounds": str(len(result.rounds)),
        "processes": str(result.processes),
        "threads": str(result.threads),
        "connections": str(result.connections),
    }
    lines = [
        f"{result.container} runs on {result.destination}: {times}",
        "  " + ", ".join(f"{name} {value}" for name, value in sizes.items()),
    ]
    if result.downtime:
        lines += ["", *downtime_bars(result.downtime)]
    return "\n".join(lines)


def downtime_bars(parts: Mapping[str, float]) -> list[str]:
    """Parts of the freeze one below the other, each bar where it lies in time."""
    total_ms = sum(parts.values()) or 1.0
    name_width = max(len(name) for name in parts)
    lines, passed_ms = [], 0.0
    for name, ms in parts.items():
        start = round(passed_ms / total_ms * _BAR_WIDTH)
        passed_ms += ms
        end = max(start + 1, round(passed_ms / total_ms * _BAR_WIDTH))
        bar = " " * start + "#" * (end - start)
        lines.append(f"  {name:<{name_width}}  {ms:8.2f} ms  |{bar:<{_BAR_WIDTH + 1}}|")
    lines.append(f"  {'sum':<{name_width}}  {sum(parts.values()):8.2f} ms")
    return lines


def failure(result: Result) -> str:
    """Why a migration did not complete, and where the container is."""
    where = {
        Status.ABORTED: f"aborted; {result.container} runs on {result.source}" if result.id else "nothing was touched",
        Status.ROLLED_BACK: f"rolled back; {result.container} runs on {result.source}",
        Status.IN_DOUBT: "in doubt",
        Status.FAILED: "not migrated; nothing was touched",
        Status.COMPLETED: "completed",
    }[result.status]
    lines = [where]
    if isinstance(result.refusals, list) and result.refusals:
        return "\n".join([*lines, *refusal_lines(result.refusals)])
    if isinstance(result.error, Problem):
        lines.append(f"  {_located(result.error.host, result.error.message)}")
        if result.error.hint:
            lines.append(f"  {result.error.hint}")
    return "\n".join(lines)


def refusal_lines(refusals: Sequence[Refusal]) -> list[str]:
    """Every refusal with what to do about it."""
    lines = []
    for refusal in refusals:
        task = f" (pid {refusal.pid}" + (f", fd {refusal.fd}" if refusal.fd >= 0 else "") + ")" if refusal.pid else ""
        lines.append(f"  {refusal.code}: {_located(refusal.host, refusal.message)}{task}")
        if refusal.hint:
            lines.append(f"      {refusal.hint}")
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, left-aligned, as wide as they need to be."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    )


def _located(host: str, message: str) -> str:
    return f"{host}: {message}" if host else message
