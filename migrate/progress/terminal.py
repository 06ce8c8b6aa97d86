"""Progress on a terminal: phase, round, %, rate, dirty rate, expected downtime, in one line that is drawn over."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from migrate import units
from migrate.events import (
    CutOverEnded,
    Event,
    PhaseEnded,
    PhaseStarted,
    RoundEnded,
    Started,
    Transfer,
    Unwinding,
    Warned,
)
from migrate.progress.lines import describe_round


class Terminal:
    """Draws with rich on the given console; `close` leaves the last state standing."""

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        self._console = console
        self._verbose = verbose
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[phase]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task("", total=100, phase="connect", figures="")
        self._round_bytes = 0  # what the round under way has to send, as far as is known
        self._before: tuple[float, int] = (time.monotonic(), 0)
        self._dirty_rate = 0.0
        self._expected_ms: float | None = None
        self._progress.start()

    def __call__(self, event: Event) -> None:
        """Draw an event."""
        match event:
            case Started():
                self._round_bytes = event.memory_bytes  # the first round sends nearly all of it
                self._print(f"[bold]{event.container}[/] {event.source} -> {event.target}  [dim]{event.migration}[/]")
            case PhaseStarted(phase=phase):
                self._before = (time.monotonic(), 0)
                self._progress.reset(self._task, total=100, phase=phase, figures="")
            case PhaseEnded(phase=phase, ms=ms):
                self._print(f"[green]+[/] {phase:<8} {units.duration(ms)}")
            case Transfer():
                self._transfer(event)
            case RoundEnded():
                self._round_ended(event)
            case CutOverEnded(report=cut):
                self._print(f"  downtime [bold]{units.duration(cut.downtime_ms)}[/]")
            case Warned(text=text):
                self._print(f"[yellow]warning:[/] {escape(text)}")
            case Unwinding(reason=reason):
                self._print(f"[yellow]undoing:[/] {escape(reason)}")

    def close(self) -> None:
        """Stop drawing."""
        self._progress.stop()

    def _transfer(self, event: Transfer) -> None:
        now = time.monotonic()
        total = event.total_bytes or self._round_bytes
        since, done_before = self._before
        if event.done_bytes < done_before:
            since, done_before = now, event.done_bytes  # a new round counts from zero
        speed = (event.done_bytes - done_before) / (now - since) if now > since else 0.0
        self._before = (now, event.done_bytes)
        figures = [units.size(event.done_bytes), units.rate(speed)]
        if event.round:
            figures.insert(0, f"round {event.round}")
        if self._expected_ms is not None:
            figures += [f"dirtied {units.rate(self._dirty_rate)}", f"downtime ~{units.duration(self._expected_ms)}"]
        percent = min(100.0, 100.0 * event.done_bytes / total) if total else 0.0
        self._progress.update(self._task, completed=percent, phase=event.phase, figures="  ".join(figures))

    def _round_ended(self, event: RoundEnded) -> None:
        self._round_bytes = event.report.remaining_bytes
        self._dirty_rate = event.dirty_rate
        self._expected_ms = event.verdict.expected_downtime_ms
        self._before = (time.monotonic(), 0)
        self._progress.update(
            self._task,
            completed=100,
            figures=f"round {event.report.round}  dirtied {units.rate(event.dirty_rate)}  "
            f"downtime ~{units.duration(self._expected_ms)}",
        )
        self._print(f"  [dim]{describe_round(event) if self._verbose else _short(event)}[/]")

    def _print(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)


def _short(event: RoundEnded) -> str:
    report = event.report
    return (
        f"round {report.round}  {units.size(report.sent_bytes)} in {units.duration(report.ms)}  "
        f"{units.rate(event.verdict.bandwidth)}  dirtied {units.rate(event.dirty_rate)}  "
        f"downtime ~{units.duration(event.verdict.expected_downtime_ms)}"
    )
