"""Gathers what happened into the result object. An observer, like the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from migrate.events import CutOverEnded, Event, RoundEnded, Started, Warned
from migrate.phases.survey import Survey
from migrate.report.result import Result, Status, problem, refusals_of, rounds_of
from migrate.request import MigrationRequest, Strategy
from protocol.errors import AbortedError, InDoubtError, MigrateError, NotConvergedError, RolledBackError
from protocol.messages import CutOverReport, RoundReport

_STATUS: dict[type[MigrateError], Status] = {
    AbortedError: Status.ABORTED,
    RolledBackError: Status.ROLLED_BACK,
    NotConvergedError: Status.ROLLED_BACK,
    InDoubtError: Status.IN_DOUBT,
}


class Tally:
    """The migration so far; `result` closes it."""

    def __init__(self, request: MigrationRequest, clock: Callable[[], float] = time.monotonic) -> None:
        self._request = request
        self._clock = clock
        self._began = clock()
        self._moving: float | None = None
        self._id = ""
        self._source = request.source or ""
        self._rounds: list[RoundReport] = []
        self._cut_over: CutOverReport | None = None
        self._warnings: list[str] = []
        self._survey: Survey | None = None

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        match event:
            case Started():
                self._id, self._source = event.migration, event.source
            case RoundEnded():
                self._rounds.append(event.report)
            case CutOverEnded():
                self._cut_over = event.report
            case Warned(text=text):
                if text not in self._warnings:
                    self._warnings.append(text)
            case _:
                pass

    def located(self, source: str) -> None:
        """The source is known."""
        self._source = source

    def surveyed(self, survey: Survey) -> None:
        """The container's figures are known."""
        self._survey = survey

    def set_up(self) -> None:
        """All is prepared: from here on bytes move."""
        self._moving = self._clock()

    def result(self, error: MigrateError | None) -> Result:
        """The whole, as it ended."""
        now = self._clock()
        cut = self._cut_over
        container = self._survey.container if self._survey is not None else None
        completed = error is None and cut is not None
        return Result(
            id=self._id,
            status=_status(error),
            container=self._request.container,
            source=self._source,
            destination=self._request.target,
            engine="native",
            strategy=Strategy.PRE_COPY.value if self._request.is_live else Strategy.STOP_COPY.value,
            downtime_ms=cut.downtime_ms if cut is not None and completed else 0.0,
            downtime=cut.parts if cut is not None and completed else {},
            total_ms=(now - self._began) * 1000.0,
            setup_ms=((self._moving if self._moving is not None else now) - self._began) * 1000.0,
            rounds=rounds_of(self._rounds),
            memory_bytes=container.memory_bytes if container is not None else 0,
            transferred_bytes=self._moved("sent_bytes"),
            wire_bytes=self._moved("wire_bytes"),
            processes=container.processes if container is not None else 0,
            threads=container.threads if container is not None else 0,
            connections=cut.connections if cut is not None and completed else _connections(self._survey),
            warnings=self._warnings,
            error=problem(error) if error is not None else msgspec.UNSET,
            refusals=refusals_of(error) if error is not None else msgspec.UNSET,
        )

    def _moved(self, field: str) -> int:
        """Bytes of all rounds and the freeze.

        A source that counts by its stream gives the total in the cut-over report, which is then the larger one.
        """
        in_rounds = sum(int(getattr(report, field)) for report in self._rounds)
        at_the_end = int(getattr(self._cut_over, field)) if self._cut_over is not None else 0
        return at_the_end if at_the_end >= in_rounds else in_rounds + at_the_end


def _connections(survey: Survey | None) -> int:
    return survey.container.connections if survey is not None else 0


def _status(error: MigrateError | None) -> Status:
    if error is None:
        return Status.COMPLETED
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), Status.FAILED)
