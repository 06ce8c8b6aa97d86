"""The tracker's own cost to a process: its pages written in a loop, armed and never armed, in the same run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from agent.engine.tracking.pagemap_scan import PagemapScanTracker
from agent.kernel import procfs
from benchmarks.downtime.records import Spread, TrackerCost

_WRITER = Path(__file__).with_name("page_writer.py")
_ROUNDS = 7


class _Writer:
    """page_writer.py; `write` makes it write once to each page and gives the ns that a page took."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._process = subprocess.Popen(
            [sys.executable, str(_WRITER), str(pages)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        self.address = int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def write(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._line()) / self._pages

    def close(self) -> None:
        self._process.communicate("")


def measure(pages: int = 65536) -> TrackerCost:
    """Plain writes before the tracker is there, then arming and writing in turn, each several times."""
    writer = _Writer(pages)
    try:
        writer.write()
        plain = [writer.write() for _ in range(_ROUNDS)]
        return _armed(writer, pages, plain)
    finally:
        writer.close()


def _armed(writer: _Writer, pages: int, plain: list[float]) -> TrackerCost:
    areas = [area for area in procfs.read_maps(writer.pid) if area.start <= writer.address < area.end]
    first: list[float] = []
    second: list[float] = []
    stops: list[float] = []
    written_ms: list[float] = []
    clean_ms: list[float] = []
    for _ in range(_ROUNDS):
        tracker = PagemapScanTracker()
        tracker.arm(writer.pid)
        stops.append(tracker.stop_ms)
        tracker.scan_round(areas)  # registers them and arms every page
        first.append(writer.write())
        second.append(writer.write())
        for times in (written_ms, clean_ms):
            began = time.perf_counter()
            tracker.scan_round(areas)
            times.append((time.perf_counter() - began) * 1e3)
        tracker.close()
    return TrackerCost(
        pages=pages, arm_stop_ms=Spread.of(stops), plain_ns=Spread.of(plain), first_write_ns=Spread.of(first),
        second_write_ns=Spread.of(second), scan_written_ms=Spread.of(written_ms), scan_clean_ms=Spread.of(clean_ms),
    )  # fmt: skip
