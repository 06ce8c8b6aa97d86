"""Sizes, rates and times for people."""

from __future__ import annotations

import math

_STEPS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(size_bytes: float) -> str:
    """'52.1 MiB'."""
    value = float(size_bytes)
    for unit in _STEPS[:-1]:
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {_STEPS[-1]}"


def count(number: int, one: str, many: str = "") -> str:
    """'1 thread', '5 threads'."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def rate(bytes_per_second: float) -> str:
    """'120.0 MiB/s'."""
    return f"{size(bytes_per_second)}/s"


def duration(ms: float) -> str:
    """'8.4 ms', '1.2 s', '3 min 20 s'."""
    if math.isinf(ms):
        return "unknown"
    if ms < 1000:
        return f"{ms:.1f} ms"
    if ms < 120_000:
        return f"{ms / 1000:.1f} s"
    return f"{ms // 60_000:.0f} min {ms % 60_000 / 1000:.0f} s"
