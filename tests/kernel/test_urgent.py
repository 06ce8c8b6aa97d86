"""A short time before all others."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator

import pytest

from agent.kernel import urgent
from agent.kernel.urgent import Urgency

pytestmark = pytest.mark.root


@pytest.fixture
def urgency() -> Iterator[Urgency]:
    made = Urgency()
    yield made
    made.end()


def test_it_is_undone(urgency):
    before = os.sched_getscheduler(0)
    urgency.begin()
    assert not gc.isenabled()
    urgency.end()
    assert (os.sched_getscheduler(0), gc.isenabled()) == (before, True)


def test_without_the_right_to_it_it_is_told_once(urgency, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    for _ in range(2):
        urgency.begin()
        urgency.end()
    assert len(caplog.records) == 1


def test_long_use_gives_the_priority_back(urgency, monkeypatch):
    before = os.sched_getscheduler(0)
    monkeypatch.setattr(urgent, "_MAX_CPU_S", 0.0)
    urgency.begin()
    time.thread_time()
    urgency.relax()
    assert os.sched_getscheduler(0) == before
