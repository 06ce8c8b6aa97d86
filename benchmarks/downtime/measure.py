"""The cells: two hosts, a redis, its client, and the container moved back and forth between the hosts."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.downtime.records import Cell, Quiet, Run, longest_waits
from tests.lab.demo import logs
from tests.lab.host import BIN, LabError
from tests.lab.lab import wait_until
from tests.lab.load import LoadReport, RedisLoad
from tests.lab.scenario import REDIS_PORT, Scenario, two_hosts

_IP = "10.77.0.50"
_NAME = "web1"
# The client's figures are asked for when late stalls (a retransmission, an ARP entry) have had the time to show.
_AFTERWARDS_S = 0.5
# Both agents keep listening for late packets until then; what they do meanwhile belongs to the run before.
_SETTLE_S = 2.0
# The event that ends the cut-over reaches us a little after the container runs.
_EVENT_LATE_S = 0.05
_TIMEOUT_S = 180.0
_MAX_FAILURES = 2

Say = Callable[[str], None]


class BenchmarkError(Exception):
    """The figures would mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    sizes_mb: Sequence[int]
    dirty_mb_per_s: Sequence[int]
    links: Sequence[str]
    runs: int
    quiet_s: float


def measure(plan: Plan, say: Say) -> Iterator[Cell]:
    """Each combination of the plan. One lab a size, so that no memory of one stays in the way of the next.

    Raises: BenchmarkError: migrations fail, or end in doubt.
    """
    for size_mb in plan.sizes_mb:
        with two_hosts() as scenario:
            scenario.add_redis(_NAME, _IP)
            for dirty in plan.dirty_mb_per_s:
                yield from _with_load(scenario, plan, size_mb, dirty, say)


def _with_load(scenario: Scenario, plan: Plan, size_mb: int, dirty: int, say: Say) -> Iterator[Cell]:
    say(f"redis of {size_mb} MB, {dirty} MB/s dirtied: filling")
    with RedisLoad(scenario.client, f"{_IP}:{REDIS_PORT}", prefill_mb=size_mb, dirty_mb_per_s=dirty) as load:
        for link in plan.links:
            for host in (scenario.a, scenario.b):
                scenario.lab.shape(host, None if link == "none" else link)
            cell = _cell(scenario, load, plan, Cell(
                size_mb=size_mb, dirty_mb_per_s=dirty, link=link, quiet=_quiet(load, plan.quiet_s), runs=[], failures=[]
            ), say)  # fmt: skip
            if not cell.runs:
                raise BenchmarkError(f"no migration succeeded: {cell.failures}\n{logs(scenario)}")
            yield cell
        for host in (scenario.a, scenario.b):
            scenario.lab.shape(host, None)


def _quiet(load: RedisLoad, seconds: float) -> Quiet:
    time.sleep(_SETTLE_S)
    load.report()
    time.sleep(seconds)
    seen = load.report()
    return Quiet(
        seconds=seen.seconds, gap_ms=seen.max_gap_ms, late_send_ms=seen.late_send_ms, p99_ms=seen.p99_ms
    )  # fmt: skip


def _cell(scenario: Scenario, load: RedisLoad, plan: Plan, cell: Cell, say: Say) -> Cell:
    head = f"  {cell.size_mb} MB, {cell.dirty_mb_per_s} MB/s dirtied, link {cell.link}"
    say(f"{head}: the client alone waits up to {cell.quiet.gap_ms:.1f} ms in {cell.quiet.seconds:.0f} s")
    while len(cell.runs) < plan.runs and len(cell.failures) < _MAX_FAILURES:
        load.report()
        try:
            run = _one_run(scenario, load)
        except FailedRunError as failed:
            cell.failures.append(str(failed))
            say(f"{head}: FAILED: {failed}")
        else:
            cell.runs.append(run)
            say(
                f"{head}: downtime {run.downtime_ms:.1f} ms, gap {run.gap_ms:.1f} ms "
                f"(sent late by {run.late_send_ms:.1f}), {run.rounds} rounds, {run.total_ms / 1e3:.1f} s"
            )
        time.sleep(_SETTLE_S)
    return cell


class FailedRunError(Exception):
    """The container stayed where it was; the text is what `migrate` said."""


def _one_run(scenario: Scenario, load: RedisLoad) -> Run:
    place: list[str] = []

    def is_in_one_place() -> bool:
        place[:] = scenario.where(_NAME)
        return len(place) == 1

    try:
        wait_until(is_in_one_place)
    except LabError as late:
        raise BenchmarkError(f"{_NAME} runs on {place}, not on exactly one host\n{logs(scenario)}") from late
    target = scenario.b if place == [scenario.a.name] else scenario.a
    seen = follow(scenario, "container", _NAME, "--to", target.name)
    if seen.result["status"] != "completed":
        error = seen.result.get("error", {})
        raise FailedRunError(f"{seen.result['status']}: {error.get('code')}: {error.get('message')}")
    time.sleep(_AFTERWARDS_S)
    return run_of(seen, load.report())


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """One `migrate`, with the time (monotonic, s) at which its cut-over was entered and told to be over."""

    events: Mapping[str, Any]  # the last of each kind
    result: Mapping[str, Any]
    cutover_began_s: float
    cutover_ended_s: float


def follow(scenario: Scenario, *arguments: str) -> Followed:
    """Run `migrate ARGUMENTS` on the client and note its events as they come. Raises: BenchmarkError: it hangs."""
    command: list[str | Path] = [BIN / "migrate", "--output", "jsonl", "--no-progress", *arguments]
    process = scenario.client.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    events: dict[str, Any] = {}
    result: dict[str, Any] = {}
    began_s = ended_s = 0.0
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            now_s = time.monotonic()
            record = json.loads(line)
            if "event" not in record:
                result = record
                continue
            events[record["event"]] = record
            if record["event"] == "phase-started" and record["phase"] == "cutover":
                began_s = now_s
            if record["event"] == "cut-over-ended":
                ended_s = now_s
        errors = process.stderr.read()
        process.wait(_TIMEOUT_S)
    if not result:
        raise BenchmarkError(f"migrate ended with {process.returncode} and no result: {errors}")
    return Followed(events=events, result=result, cutover_began_s=began_s, cutover_ended_s=ended_s)


def run_of(seen: Followed, client: LoadReport) -> Run:
    """What both sides and the client say of one migration."""
    result, cut = seen.result, seen.events["cut-over-ended"]["report"]
    gap_ms, other_ms = longest_waits(
        ((gap.at_monotonic_s, gap.ms) for gap in client.gaps),
        seen.cutover_began_s,
        seen.cutover_ended_s + _EVENT_LATE_S,
    )
    rounds = result["rounds"]
    return Run(
        downtime_ms=result["downtime_ms"], parts=result["downtime"], target_parts=cut["target_parts"], gap_ms=gap_ms,
        other_gap_ms=other_ms, late_send_ms=client.late_send_ms, rounds=len(rounds), total_ms=result["total_ms"],
        setup_ms=result["setup_ms"], memory_bytes=result["memory_bytes"], wire_bytes=result["wire_bytes"],
        dirty_bytes=cut["dirty_bytes"], first_round_mb_per_s=rounds[0]["bandwidth"] / 1e6 if rounds else 0.0,
        packets_caught=cut["packets_caught"],
        before_freeze_ms=(seen.cutover_ended_s - seen.cutover_began_s) * 1e3 - result["downtime_ms"],
    )  # fmt: skip
