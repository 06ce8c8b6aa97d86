"""The same journey with crun as the runtime of both hosts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.containers import ContainerHost
from tests.lab.load import RedisLoad
from tests.lab.scenario import REDIS, REDIS_PORT, Scenario, two_hosts, wait_for_port

CRUN = ("crun", "--root", "/run/crun")


@pytest.fixture(scope="module")
def scenario() -> Iterator[Scenario]:
    with two_hosts(agents=False) as hosts:
        hosts.lab.install_agents(start=False)
        for host in (hosts.a, hosts.b):
            with (host.persist / "etc/migrate/agent.toml").open("a") as settings:
                settings.write('[[runtimes]]\nkind = "crun"\nroot = "/run/crun"\n')
            host.start_agent()
        yield hosts


def _crun_list(host: ContainerHost) -> dict[str, str]:
    listed = json.loads(host.run([*CRUN, "list", "--format", "json"]).stdout) or []
    return {entry["id"]: entry["status"] for entry in listed}


def _without_cgroup_mount(config: dict[str, Any]) -> None:
    """With version 1 crun puts links of its own into a tmpfs there, and contents of a tmpfs are not carried yet."""
    config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] != "/sys/fs/cgroup"]


def test_redis_under_crun_moves_under_load_there_and_back(scenario: Scenario, ip: str) -> None:
    bundle = scenario.a.make_bundle("web1", args=REDIS, edit=_without_cgroup_mount)
    scenario.b.make_bundle("web1", args=REDIS, edit=_without_cgroup_mount)
    scenario.a.attach_network("web1", f"{ip}/24")
    command = [*CRUN, "run", "--detach", "--bundle", str(bundle), "web1"]
    scenario.a.run(["sh", "-c", 'exec "$@" </dev/null >/tmp/web1.log 2>&1', "sh", *command])
    wait_for_port(scenario.client, ip, REDIS_PORT)
    hosts = {"hostA": scenario.a, "hostB": scenario.b}
    with RedisLoad(scenario.client, f"{ip}:{REDIS_PORT}", prefill_mb=20) as load:
        port = load.report().local_port
        for target in ("hostB", "hostA"):
            moved = scenario.migrate_json("container", "web1", "--to", target)
            assert moved["status"] == "completed"
            assert {name: _crun_list(host) for name, host in hosts.items()} == {
                name: ({"web1": "running"} if name == target else {}) for name in hosts
            }
            load.report()
            assert load.report().local_port == port, "the connection was made anew"
        assert load.stop().keys_read_back > 0
    assert scenario.a.run([*CRUN, "exec", "web1", "/bin/true"], check=False).returncode == 0
