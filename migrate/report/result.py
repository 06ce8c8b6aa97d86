"""The result object of `--json`: schema 1, read by tests and playbooks."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from migrate.convergence import dirty_rate
from migrate.errors import RefusedError
from protocol.errors import MigrateError
from protocol.messages import Refusal, RoundReport

SCHEMA = 1


class Status(enum.Enum):
    """How it ended."""

    COMPLETED = "completed"
    ABORTED = "aborted"  # on request, the container runs on the source
    ROLLED_BACK = "rolled-back"  # failed and undone, the container runs on the source
    IN_DOUBT = "in-doubt"  # `migrate recover` has to find out
    FAILED = "failed"  # before anything was touched


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One pre-copy round."""

    round: int
    dirty_bytes: int
    sent_bytes: int
    wire_bytes: int
    ms: float
    bandwidth: float  # page bytes per second
    dirty_rate: float  # bytes per second


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Why it did not complete."""

    code: str
    message: str
    host: str
    hint: str


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """One migration, over."""

    schema: int = SCHEMA
    id: str
    status: Status
    container: str
    source: str
    destination: str
    engine: str
    strategy: str
    downtime_ms: float = 0.0
    downtime: dict[str, float] = {}  # ms by part, in the order they happened
    total_ms: float = 0.0
    setup_ms: float = 0.0
    rounds: list[Round] = []
    memory_bytes: int = 0
    transferred_bytes: int = 0
    wire_bytes: int = 0
    processes: int = 0
    threads: int = 0
    connections: int = 0
    warnings: list[str] = []
    error: Problem | msgspec.UnsetType = msgspec.UNSET
    refusals: list[Refusal] | msgspec.UnsetType = msgspec.UNSET  # only if there are any: each reason, in full


def problem(error: MigrateError) -> Problem:
    """The `error` part of a result."""
    return Problem(code=error.code, message=error.message, host=error.host, hint=error.hint)


def refusals_of(error: MigrateError) -> list[Refusal] | msgspec.UnsetType:
    """Every reason of a refusal; UNSET: the error is none."""
    return list(error.refusals) if isinstance(error, RefusedError) else msgspec.UNSET


def rounds_of(reports: Sequence[RoundReport]) -> list[Round]:
    """Rounds as the result has them."""
    return [
        Round(
            round=report.round,
            dirty_bytes=report.dirty_bytes,
            sent_bytes=report.sent_bytes,
            wire_bytes=report.wire_bytes,
            ms=report.ms,
            bandwidth=report.sent_bytes / report.ms * 1000.0 if report.ms > 0 else 0.0,
            dirty_rate=dirty_rate(report),
        )
        for report in reports
    ]
