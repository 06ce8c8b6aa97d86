"""What the figures were taken on."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
from pathlib import Path

from benchmarks.downtime.records import Machine

_PROJECT = Path(__file__).parents[2]
# Above this, other programs' work shows in figures of milliseconds.
QUIET_LOAD = 0.5


def describe() -> Machine:
    """This machine, now."""
    cpu = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), "unknown",
    )  # fmt: skip
    return Machine(
        date=dt.datetime.now(tz=dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        kernel=Path("/proc/sys/kernel/osrelease").read_text().strip(), cpu=cpu, cores=os.cpu_count() or 0,
        revision=_revision(), load_before=os.getloadavg()[0],
    )  # fmt: skip


def _revision() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=_PROJECT, capture_output=True, text=True, check=False).stdout

    changed = " and changes" if git("status", "--porcelain", "--untracked-files=no").strip() else ""
    return f"{git('rev-parse', '--short', 'HEAD').strip() or 'unknown'}{changed}"
