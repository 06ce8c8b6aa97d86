"""Fixtures for every suite. What needs root fails without it: nothing is skipped in silence."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.lab import Lab

_NEEDS_ROOT = ["root", "e2e", "survival"]


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
