"""Durations and rates, as people write them."""

from __future__ import annotations

import pytest

from migrate.request import MigrationRequest, Strategy, not_carried, parse_duration, parse_rate


@pytest.mark.parametrize(
    ("text", "seconds"), [("300ms", 0.3), ("2s", 2.0), ("10m", 600.0), ("1.5h", 5400.0), ("3", 3.0), ("50us", 5e-5)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("0", 0), ("50M", 50_000_000), ("64MiB", 64 << 20), ("1gbit", 125_000_000), ("10k", 10_000), ("8 kbit/s", 1000)],
)
def test_rates(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "-1s", "3 parsecs", "1m30s"])
def test_other_forms_of_a_duration_are_refused(text):
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


def test_the_freeze_budget_of_a_stop_copy_is_its_timeout():
    request = MigrationRequest(container="c", target="h", strategy=Strategy.STOP_COPY, timeout_s=90.0)
    assert request.effective_freeze_budget_s == 90.0
    assert MigrationRequest(container="c", target="h").effective_freeze_budget_s == 2.0


def test_an_ordinary_request_is_carried():
    assert not_carried(MigrationRequest(container="c", target="h")) == []
