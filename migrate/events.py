"""What happens during a migration, told to observers: terminal, log, JSON lines. Observers only look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from migrate.convergence import Verdict
from protocol.messages import CutOverReport, RoundReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The hosts are known and the migration begins."""

    migration: str
    container: str
    source: str
    target: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseStarted:
    """A phase was entered."""

    phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEnded:
    """A phase was left; `text` says in a few words what it did."""

    phase: str
    ms: float
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Bytes moved within a phase."""

    phase: str
    round: int
    done_bytes: int
    total_bytes: int
    wire_bytes: int
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEnded:
    """A pre-copy round is over."""

    report: RoundReport
    verdict: Verdict
    dirty_rate: float  # bytes per second


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOverEnded:
    """The freeze is over, one way or the other."""

    report: CutOverReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """Something a person should know, which stops nothing."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unwinding:
    """The migration is being undone."""

    reason: str


Event = Started | PhaseStarted | PhaseEnded | Transfer | RoundEnded | CutOverEnded | Warned | Unwinding
Observer = Callable[[Event], None]
