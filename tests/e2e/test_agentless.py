"""No daemon, only sshd: `migrate` starts an agent at each end for as long as it needs one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.e2e import observe
from tests.e2e.observe import Moving
from tests.lab.containers import ContainerHost
from tests.lab.lab import wait_until
from tests.lab.load import RedisLoad
from tests.lab.scenario import Scenario, two_hosts

_FILLED_MB = 20
# Several seconds of pre-copy.
_SLOWLY = ("--bandwidth", "3M")


@pytest.fixture(scope="module")
def scenario() -> Iterator[Scenario]:
    with two_hosts(agentless=True) as hosts:
        yield hosts


def _agents(host: ContainerHost) -> list[str]:
    """What belongs to an agent there."""
    return [line for line in observe.processes(host).values() if "migrate-agent" in line or "agent." in line]


def _wait_no_agents(scenario: Scenario) -> None:
    for host in (scenario.a, scenario.b):
        wait_until(lambda host=host: not _agents(host), what=f"the end of the agent on {host.name}")


def test_redis_moves_under_load_there_and_back(scenario: Scenario, ip: str) -> None:
    scenario.add_redis("web1", ip)
    _wait_no_agents(scenario)
    with RedisLoad(scenario.client, f"{ip}:6379", prefill_mb=_FILLED_MB) as load:
        port = load.report().local_port
        for target in ("hostB", "hostA"):
            moved = scenario.migrate_json("container", "web1", "--to", target)
            assert (moved["status"], moved["destination"], moved["warnings"]) == ("completed", target, [])
            assert scenario.where("web1") == [target]
            load.report()
            assert load.report().local_port == port, "the connection was made anew"
        assert load.stop().keys_read_back > 0
    for host in (scenario.a, scenario.b):
        assert [row.state for row in observe.journal(host)] == ["finished", "finished"]
    _wait_no_agents(scenario)


@pytest.mark.parametrize("how", ["coordinator", "source agent", "target link"])
def test_a_session_that_ends_in_pre_copy_undoes_everything(scenario: Scenario, ip: str, how: str) -> None:
    name = f"redis-{how.partition(' ')[0]}"
    container = scenario.add_redis(name, ip)
    before = {host: observe.snapshot(host) for host in (scenario.a, scenario.b)}
    pid = container.pid
    with RedisLoad(scenario.client, f"{ip}:6379", prefill_mb=_FILLED_MB) as load:
        port = load.report().local_port
        moving = Moving(scenario, name, scenario.a, *_SLOWLY)
        moving.wait_precopy()
        row = moving.row(scenario.a)
        assert row is not None
        if how == "coordinator":
            # Another session is another agent process: it says who drives the migration.
            refused = scenario.migrate("abort", row.migration, check=False)
            assert refused.returncode == 3
            assert "belongs to another agent process" in refused.stderr
            moving.process.kill()
            moving.process.communicate()
        elif how == "source agent":
            (agent,) = [
                pid for pid, line in observe.processes(scenario.a).items() if line.endswith("bin/migrate-agent --stdio")
            ]
            os.kill(agent, signal.SIGTERM)
            status, result = moving.end()
            assert (status, result["status"]) == (8, "aborted")
            assert "the agent was stopped" in result["error"]["message"]
        else:
            scenario.lab.link_down(scenario.b)
            try:
                status, result = moving.end()
                assert (status, result["status"]) == (5, "rolled-back")
            finally:
                scenario.lab.link_up(scenario.b)
        assert moving.wait_over(scenario.a).state == "aborted"
        assert moving.wait_over(scenario.b).state == "discarded"
        load.report()
        assert load.report().local_port == port
        assert load.stop().keys_read_back > 0
    _wait_no_agents(scenario)
    assert scenario.where(name) == ["hostA"]
    assert scenario.a.container(name).pid == pid
    for host, then in before.items():
        assert observe.snapshot(host) == then, f"left behind on {host.name}"
