"""Progress where there is no terminal: one line a phase, and with `verbose` one a round."""

from __future__ import annotations

from typing import TextIO

from migrate import units
from migrate.events import CutOverEnded, Event, PhaseEnded, RoundEnded, Started, Unwinding, Warned
from protocol.messages import RoundReport

_DONE = {
    "check": "checked",
    "prepare": "prepared",
    "precopy": "copied",
    "cutover": "cut over",
    "finish": "cleaned up",
}


class Lines:
    """Writes to a text stream, which stays the caller's."""

    def __init__(self, stream: TextIO, *, verbose: bool = False) -> None:
        self._stream = stream
        self._verbose = verbose
        self._rounds: list[RoundReport] = []
        self._downtime_ms = 0.0

    def __call__(self, event: Event) -> None:
        """Say what is worth a line."""
        match event:
            case Started():
                self._say(f"{event.migration}: {event.container} from {event.source} to {event.target}")
            case PhaseEnded(phase=phase, ms=ms):
                self._say(f"{_DONE.get(phase, phase)} in {units.duration(ms)}{self._detail(phase)}")
            case RoundEnded(report=report):
                self._rounds.append(report)
                if self._verbose:
                    self._say(f"  {describe_round(event)}")
            case CutOverEnded(report=cut):
                self._downtime_ms = cut.downtime_ms
            case Warned(text=text):
                self._say(f"warning: {text}")
            case Unwinding(reason=reason):
                self._say(f"undoing: {reason}")
            case _:
                pass

    def close(self) -> None:
        """Nothing is held."""

    def _detail(self, phase: str) -> str:
        if phase == "precopy" and self._rounds:
            sent = sum(report.sent_bytes for report in self._rounds)
            wire = sum(report.wire_bytes for report in self._rounds)
            plural = "" if len(self._rounds) == 1 else "s"
            return f": {len(self._rounds)} round{plural}, {units.size(sent)}, {units.size(wire)} on the wire"
        if phase == "cutover":
            return f": downtime {units.duration(self._downtime_ms)}"
        return ""

    def _say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def describe_round(event: RoundEnded) -> str:
    """One round in one line."""
    report, verdict = event.report, event.verdict
    return (
        f"round {report.round}: {units.size(report.dirty_bytes)} dirty, {units.size(report.sent_bytes)} sent in "
        f"{units.duration(report.ms)} ({units.rate(verdict.bandwidth)}), dirtied at {units.rate(event.dirty_rate)}, "
        f"expected downtime {units.duration(verdict.expected_downtime_ms)}: {verdict.decision.value} ({verdict.reason})"
    )
