"""What observers write."""

from __future__ import annotations

import io
import json

from rich.console import Console

from migrate.convergence import Decision, Verdict
from migrate.events import CutOverEnded, PhaseEnded, PhaseStarted, RoundEnded, Started, Transfer, Unwinding, Warned
from migrate.progress.lines import Lines
from migrate.progress.records import JsonLines
from migrate.progress.terminal import Terminal
from migrate.report.text import downtime_bars
from tests.migrate.fake_agent import cut_over_report, healthy_round

VERDICT = Verdict(decision=Decision.COPY_AGAIN, expected_downtime_ms=25.0, bandwidth=1e8, reason="worth it")
STORY = [
    PhaseStarted(phase="check"),
    PhaseEnded(phase="check", ms=12.0),
    Started(migration="m0123456789", container="web1", source="hostA", target="hostB", memory_bytes=64 << 20),
    PhaseStarted(phase="precopy"),
    Transfer(phase="precopy", round=1, done_bytes=10 << 20, total_bytes=64 << 20, wire_bytes=1),
    RoundEnded(report=healthy_round(1), verdict=VERDICT, dirty_rate=1e6),
    Transfer(phase="precopy", round=2, done_bytes=1 << 20, total_bytes=0, wire_bytes=1),
    PhaseEnded(phase="precopy", ms=320.0),
    PhaseStarted(phase="cutover"),
    CutOverEnded(report=cut_over_report()),
    PhaseEnded(phase="cutover", ms=20.0),
    Warned(text="odd name anon_inode:[io_uring]"),
    Unwinding(reason="[bold]no markup[/]"),
]


def tell(observer):
    for event in STORY:
        observer(event)
    observer.close()


def test_without_a_terminal_there_is_one_line_a_phase():
    out = io.StringIO()
    tell(Lines(out))
    assert out.getvalue().splitlines() == [
        "checked in 12.0 ms",
        "m0123456789: web1 from hostA to hostB",
        "copied in 320.0 ms: 1 round, 4.0 MiB, 1.0 MiB on the wire",
        "cut over in 20.0 ms: downtime 12.5 ms",
        "warning: odd name anon_inode:[io_uring]",
        "undoing: [bold]no markup[/]",
    ]


def test_verbose_lines_have_the_rounds():
    out = io.StringIO()
    tell(Lines(out, verbose=True))
    assert "expected downtime 25.0 ms: copy-again (worth it)" in out.getvalue()


def test_a_terminal_shows_round_rates_and_expected_downtime():
    out = io.StringIO()
    tell(Terminal(Console(file=out, force_terminal=True, width=160, color_system=None)))
    text = out.getvalue()
    assert "downtime ~25.0 ms" in text
    assert "dirtied 976.6 KiB/s" in text
    assert "anon_inode:[io_uring]" in text
    assert "[bold]no markup[/]" in text


def test_json_lines_are_objects_with_the_kind_of_event():
    out = io.StringIO()
    tell(JsonLines(out))
    records = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(records) == len(STORY)
    assert records[5]["event"] == "round-ended"
    assert records[5]["verdict"]["decision"] == "copy-again"


def test_the_bars_of_the_downtime_lie_one_after_the_other():
    lines = downtime_bars({"freeze": 1.0, "copy": 2.0, "commit": 1.0})
    bars = [line.split("|")[1] for line in lines[:-1]]
    starts = [bar.index("#") for bar in bars]
    assert starts == sorted(starts)
    assert lines[-1].split()[1] == "4.00"
