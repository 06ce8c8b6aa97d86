"""Fixtures for every suite. What needs root fails without it: nothing is skipped in silence."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.lab import Lab

# A property is about facts, not about how long a busy machine takes for an example.
settings.register_profile("facts", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("facts")

TESTS = Path(__file__).parent
# The folder says what a test is; `root` is for single tests and modules elsewhere.
_MARK_OF_FOLDER = {"kernel": "kernel", "survival": "survival", "e2e": "e2e"}
_NEEDS_ROOT = ["root", "kernel", "survival", "e2e"]
# Reason as given to pytest.skip -> why that is accepted. Any other skip fails the run.
_ACCEPTED_SKIPS: dict[str, str] = {}

_skipped = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_skipped] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(TESTS):
            mark = _MARK_OF_FOLDER.get(item.path.relative_to(TESTS).parts[0])
            if mark:
                item.add_marker(mark)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in _ACCEPTED_SKIPS:
            item.config.stash[_skipped].append(f"{item.nodeid}: {reason}")
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.stash[_skipped] and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[_skipped]:
        terminalreporter.write_line(f"skipped without leave (tests/conftest.py): {line}", red=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if os.geteuid() != 0 and any(item.get_closest_marker(name) for name in _NEEDS_ROOT):
        pytest.fail("this test needs root; `make unit` runs those that do not", pytrace=False)
    if not sys.platform.startswith("linux"):
        pytest.fail("the kernel under test is Linux", pytrace=False)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """An empty lab, shared by the tests of a module: it costs 40 ms, each host 90 ms more."""
    with Lab() as lab:
        yield lab
