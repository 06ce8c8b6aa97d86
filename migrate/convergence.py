"""When to stop copying: a pure function of the rounds so far."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.messages import ContainerReport, RoundReport

# A round that shrank the rest by less than this has reached what the container dirties in the meantime.
WORTHWHILE_SHRINK = 0.30
# Rounds of a few pages are all fixed cost; look back until so many bytes were sent to know the link.
BANDWIDTH_SAMPLE_BYTES = 16 << 20
# The first round's scan registers and walks everything, 100 ms for a GB: no measure for what a short round costs.
NEGLIGIBLE_REST_MS = 2.0


class Decision(enum.Enum):
    """What to do after a round."""

    COPY_AGAIN = "copy-again"
    CUT_OVER = "cut-over"
    GIVE_UP = "give-up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the rounds have to keep within."""

    max_downtime_ms: float
    max_rounds: int
    remaining_ms: float  # until the migration's timeout
    fixed_ms: float  # of a freeze in which nothing is left to send


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A decision, and the figures behind it."""

    decision: Decision
    expected_downtime_ms: float
    bandwidth: float  # page bytes per second
    reason: str


def decide(rounds: Sequence[RoundReport], budget: Budget) -> Decision:
    """What to do after `rounds`, of which there is at least one."""
    return judge(rounds, budget).decision


def judge(rounds: Sequence[RoundReport], budget: Budget) -> Verdict:
    """`decide`, with its figures.

    Cuts over when the expected downtime is allowed AND copying once more would hardly make it shorter: the downtime
    is to be as short as it can be, not as long as it may be.
    """
    last = rounds[-1]
    speed = bandwidth(rounds)
    expected_ms = expected_downtime_ms(rounds, budget.fixed_ms)
    allowed = expected_ms <= budget.max_downtime_ms
    before = rounds[-2].remaining_bytes if len(rounds) > 1 else last.dirty_bytes
    shrank = 1.0 - last.remaining_bytes / before if before else 0.0
    rest_ms = _copy_ms(last.remaining_bytes, speed)

    def verdict(decision: Decision, reason: str) -> Verdict:
        return Verdict(decision=decision, expected_downtime_ms=expected_ms, bandwidth=speed, reason=reason)

    if allowed and rest_ms <= min(last.scan_ms, NEGLIGIBLE_REST_MS):
        return verdict(Decision.CUT_OVER, "the rest costs less than one scan")
    if allowed and shrank < WORTHWHILE_SHRINK:
        return verdict(Decision.CUT_OVER, f"the last round shrank the rest by {shrank:.0%} only")
    if len(rounds) >= budget.max_rounds:
        if allowed:
            return verdict(Decision.CUT_OVER, "out of rounds, and within the downtime allowed")
        return verdict(Decision.GIVE_UP, f"not within the downtime allowed after {len(rounds)} rounds")
    if rest_ms > budget.remaining_ms:
        if allowed:
            return verdict(Decision.CUT_OVER, "out of time, and within the downtime allowed")
        return verdict(Decision.GIVE_UP, "another round would end after the timeout")
    return verdict(Decision.COPY_AGAIN, "another round is worth it" if allowed else "too much is left")


def bandwidth(rounds: Sequence[RoundReport]) -> float:
    """Page bytes per second over the latest rounds, as far back as it takes to know; 0: nothing was sent."""
    sent_bytes, took_ms = 0, 0.0
    for report in reversed(rounds):
        if not report.sent_bytes:
            continue
        sent_bytes += report.sent_bytes
        took_ms += max(report.ms - report.scan_ms, 0.001)
        if sent_bytes >= BANDWIDTH_SAMPLE_BYTES:
            break
    return sent_bytes / took_ms * 1000.0 if sent_bytes else 0.0


def expected_downtime_ms(rounds: Sequence[RoundReport], fixed_ms: float) -> float:
    """What a cut-over now would cost."""
    return fixed_ms + _copy_ms(rounds[-1].remaining_bytes, bandwidth(rounds))


def fixed_cost_ms(container: ContainerReport) -> float:
    """Of a freeze in which nothing is left to send: processes, threads and connections have their price.

    Measured with redis (one process, 5 threads): 7 to 17 ms; a process more 2 ms, a connection 0.03 ms.
    """
    return 8.0 + 2.0 * container.processes + 0.05 * container.threads + 0.03 * container.connections


def dirty_rate(report: RoundReport) -> float:
    """Bytes per second that the container dirtied while this round ran."""
    return report.remaining_bytes / report.ms * 1000.0 if report.ms > 0 else 0.0


def _copy_ms(size_bytes: int, bytes_per_second: float) -> float:
    if not size_bytes:
        return 0.0
    return size_bytes / bytes_per_second * 1000.0 if bytes_per_second > 0 else math.inf
