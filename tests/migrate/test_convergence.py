"""When to stop copying."""

from __future__ import annotations

import pytest

from migrate.convergence import Budget, Decision, bandwidth, decide, expected_downtime_ms, judge
from protocol.messages import RoundReport

MIB = 1 << 20
BUDGET = Budget(max_downtime_ms=300.0, max_rounds=30, remaining_ms=600_000.0, fixed_ms=10.0)


def rounds(*rest_mib: float, first_mib: float = 256, mib_per_s: float = 100.0, scan_ms: float = 1.0):
    """Rounds that each sent what the one before left, and left `rest_mib`."""
    out, todo = [], first_mib
    for number, rest in enumerate(rest_mib, 1):
        ms = todo / mib_per_s * 1000 + scan_ms
        out.append(
            RoundReport(
                round=number, dirty_bytes=int(todo * MIB), sent_bytes=int(todo * MIB), wire_bytes=int(todo * MIB),
                ms=ms, scan_ms=scan_ms, remaining_bytes=int(rest * MIB),
            )
        )  # fmt: skip
        todo = rest
    return out


@pytest.mark.parametrize(
    ("history", "decision"),
    [
        pytest.param(rounds(0), Decision.CUT_OVER, id="idle: nothing is left"),
        pytest.param(rounds(0.05), Decision.CUT_OVER, id="less is left than a scan costs"),
        pytest.param(
            rounds(13.0, first_mib=1300, mib_per_s=145, scan_ms=108),
            Decision.COPY_AGAIN,
            id="the first scan of much memory is no measure",
        ),
        pytest.param(rounds(20), Decision.COPY_AGAIN, id="within the budget, but the next round will shrink it"),
        pytest.param(rounds(20, 2), Decision.COPY_AGAIN, id="still shrinking"),
        pytest.param(rounds(20, 2, 1.8), Decision.CUT_OVER, id="no longer shrinking, and allowed"),
        pytest.param(rounds(20, 2, 3), Decision.CUT_OVER, id="growing, and allowed"),
        pytest.param(rounds(200, 190), Decision.COPY_AGAIN, id="not shrinking, and not allowed"),
        pytest.param(rounds(*[60] * 30), Decision.GIVE_UP, id="out of rounds"),
        pytest.param(rounds(*[20 - n / 2 for n in range(29)], 1), Decision.CUT_OVER, id="out of rounds, but allowed"),
    ],
)
def test_decisions(history, decision):
    assert decide(history, BUDGET) is decision


def test_a_round_that_would_end_after_the_timeout_is_not_begun():
    late = Budget(max_downtime_ms=300.0, max_rounds=30, remaining_ms=500.0, fixed_ms=10.0)
    assert decide(rounds(200, 100), late) is Decision.GIVE_UP


def test_out_of_time_but_within_the_downtime_allowed_cuts_over():
    late = Budget(max_downtime_ms=300.0, max_rounds=30, remaining_ms=100.0, fixed_ms=10.0)
    assert decide(rounds(200, 20), late) is Decision.CUT_OVER


def test_the_downtime_allowed_decides_what_is_too_much():
    history = rounds(20, 19)
    assert decide(history, BUDGET) is Decision.CUT_OVER
    strict = Budget(max_downtime_ms=100.0, max_rounds=30, remaining_ms=600_000.0, fixed_ms=10.0)
    assert decide(history, strict) is Decision.COPY_AGAIN


def test_expected_downtime_is_the_rest_by_the_measured_bandwidth_and_the_fixed_cost():
    assert expected_downtime_ms(rounds(20), 10.0) == pytest.approx(210.0, rel=0.01)


def test_bandwidth_comes_from_enough_bytes_not_from_the_last_small_round():
    history = [
        *rounds(0.1),
        RoundReport(round=2, dirty_bytes=4096, sent_bytes=4096, wire_bytes=4096, ms=5.0, scan_ms=1.0),
    ]
    assert bandwidth(history) == pytest.approx(100 * MIB, rel=0.05)


def test_nothing_sent_yet_is_no_bandwidth_and_no_cut_over():
    history = [RoundReport(round=1, dirty_bytes=MIB, sent_bytes=0, wire_bytes=0, ms=5.0, remaining_bytes=MIB)]
    verdict = judge(history, BUDGET)
    assert verdict.decision is not Decision.CUT_OVER


def test_a_verdict_has_a_reason_for_people():
    assert judge(rounds(20, 2, 1.8), BUDGET).reason == "the last round shrank the rest by 10% only"
