"""Two hosts with agents for the tests of one file; each test has containers of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.lab.scenario import Scenario, two_hosts

_ADDRESSES = itertools.count(50)


@pytest.fixture(scope="module")
def scenario() -> Iterator[Scenario]:
    """Agents serve as daemons."""
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture
def ip() -> str:
    """An address on the LAN that nobody has used."""
    return f"10.77.0.{next(_ADDRESSES)}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """The agents' logs belong to a failure."""
    if call.excinfo is None or not isinstance(item, pytest.Function):
        return
    hosts = item.funcargs.get("scenario")
    if isinstance(hosts, Scenario):
        for host in (hosts.a, hosts.b):
            if host.agent_log.exists():
                item.add_report_section(
                    call.when, f"agent of {host.name}", host.agent_log.read_text(errors="replace")[-6000:]
                )
