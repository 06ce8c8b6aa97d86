"""Downtime of a live migration of redis, by part, and what its client sees: two test hosts, agents, the command line.

Needs root and a quiet machine. `python -m benchmarks.downtime --help`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import msgspec

from benchmarks.downtime import machine, measure, page, profile, text, tracker
from benchmarks.downtime.records import Report


def _numbers(value: str) -> list[int]:
    return [int(part) for part in value.split(",")]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.downtime", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=_numbers, default=[64, 256, 1024], metavar="MB,..", help="of the redis")
    parser.add_argument("--dirty", type=_numbers, default=[0, 20], metavar="MB/S,..", help="written by a second client")
    parser.add_argument("--links", type=lambda value: value.split(","), default=["none", "1gbit"], metavar="RATE,..",
                        help="of each host, as tc(8) writes it; none: unshaped")  # fmt: skip
    parser.add_argument("--runs", type=int, default=6, help="migrations of each combination, back and forth")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="show this; a profile that it lacks is taken now"
    )
    parser.add_argument("--quick", action="store_true", help="64 MB, idle, unshaped, 2 runs; no profile")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--write-docs", action="store_true", help=f"put the tables into {page.PAGE.name}")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.dirty, options.links, options.runs, options.no_profile = [64], [0], ["none"], 2, True
    return options


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _measure(options: argparse.Namespace) -> Report:
    here = machine.describe()
    if here.load_before > machine.QUIET_LOAD:
        _say(f"This machine is not quiet (load average {here.load_before:.2f}): the figures will show it.")
    plan = measure.Plan(
        sizes_mb=options.sizes, dirty_mb_per_s=options.dirty, links=options.links, runs=options.runs,
        quiet_s=2.0 if options.quick else 5.0,
    )  # fmt: skip
    cost = tracker.measure()
    report = Report(machine=here, cells=[], tracker=cost)
    for cell in measure.measure(plan, _say):
        report.cells.append(cell)
        _keep(options, report)  # what is measured stays, if a later cell fails
    after = msgspec.structs.replace(here, load_after=os.getloadavg()[0])
    report = msgspec.structs.replace(report, machine=after)
    return report if options.no_profile else _profiled(report)


def _profiled(report: Report) -> Report:
    here = machine.describe()
    rows = profile.take(say=_say)
    here = msgspec.structs.replace(here, load_after=os.getloadavg()[0])
    return msgspec.structs.replace(report, profile=rows, profile_machine=here)


def _keep(options: argparse.Namespace, report: Report) -> None:
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))


def main() -> int:
    """Measure, then show."""
    options = _arguments()
    if options.from_json:
        report = msgspec.json.decode(options.from_json.read_bytes(), type=Report)
        if not options.no_profile and not report.profile:
            report = _profiled(report)
    else:
        report = _measure(options)
    _keep(options, report)
    print(text.plain(report))
    if options.write_docs:
        page.write(text.markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
