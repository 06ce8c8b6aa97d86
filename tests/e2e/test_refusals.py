"""What cannot move is refused with its name, before anything is touched: the container never notices."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import observe
from tests.e2e.observe import Moving
from tests.lab.containers import Container, ContainerHost
from tests.lab.host import make_key
from tests.lab.lab import wait_until
from tests.lab.load import RedisLoad
from tests.lab.scenario import Scenario

_HOLDER = Path(__file__).with_name("programs") / "holder.py"
_FILES = {"/opt/lab/holder.py": _HOLDER}
_MIB = 1 << 20


def _args(*words: str) -> tuple[str, ...]:
    return ("/usr/bin/python3", "/opt/lab/holder.py", *words)


def _count(container: Container) -> int:
    return container.log.read_text().count("\n")


def _add(scenario: Scenario, name: str, ip: str, *words: str, **bundle: Any) -> Container:
    container = scenario.add_container(name, _args(*words), ip, files=_FILES, **bundle)
    wait_until(lambda: _count(container) > 0, what=f"the first line of {name}")
    return container


@contextlib.contextmanager
def untouched(scenario: Scenario, container: Container) -> Iterator[None]:
    """After the block both hosts are as they were, the journals too, and the container counts on."""
    hosts = (scenario.a, scenario.b)
    before = [(observe.snapshot(host), observe.journal(host)) for host in hosts]
    yield
    counted = _count(container)
    assert [(observe.snapshot(host), observe.journal(host)) for host in hosts] == before
    assert scenario.a.container(container.name).pid == container.pid
    wait_until(lambda: _count(container) > counted, what="the container counting on")


def _refused(scenario: Scenario, *arguments: str, status: int = 3) -> dict[str, Any]:
    result = scenario.migrate_json("container", *arguments, status=status)
    assert result["status"] == "failed"
    assert result["error"]["message"]
    return result


def _by_code(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {refusal["code"]: refusal for refusal in result["refusals"]}


@pytest.mark.parametrize(
    ("what", "code", "object_"),
    [
        ("io_uring", "io-uring", "io_uring"),
        ("child", "process-tree", ""),
        ("file", "file-open-for-writing", "/tmp/data"),
    ],
)
def test_what_the_engine_does_not_carry_is_named(scenario: Scenario, ip: str, what: str, code: str, object_: str):
    name = f"holds-{what}".replace("_", "-")
    container = _add(scenario, name, ip, what)
    with untouched(scenario, container):
        refusal = _by_code(_refused(scenario, name, "--to", "hostB"))[code]
        checked = scenario.migrate_json("check", name, "--to", "hostB", status=3)
    assert refusal["host"] == "hostA"
    assert object_ in refusal["object"]
    assert refusal["message"]
    if object_:
        assert refusal["pid"] == 1
        assert refusal["fd"] >= 3
    assert not checked["feasible"]
    assert refusal in checked["refusals"]


def test_a_container_at_its_own_memory_limit_is_refused(scenario: Scenario, ip: str):
    container = _add(scenario, "tight", ip, "memory", str(24 * _MIB), memory_limit_bytes=40 * _MIB)
    with untouched(scenario, container):
        refusal = _by_code(_refused(scenario, "tight", "--to", "hostB"))["memory-limit"]
    assert "40 MiB" in refusal["message"]


@contextlib.contextmanager
def _short_of_memory(host: ContainerHost, left_bytes: int) -> Iterator[None]:
    """The host can give its programs `left_bytes` more."""
    (group,) = [d for d in host.cgroups.directories if (d / "memory.stat").exists()]
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    used = {name.removeprefix("total_"): int(value) for name, value in statistics.items()}
    host.limit_memory(used.get("rss", used.get("anon", 0)) + used["active_file"] + left_bytes)
    try:
        yield
    finally:
        host.limit_memory(None)


def test_a_target_without_free_memory_is_refused(scenario: Scenario, ip: str):
    container = _add(scenario, "large", ip, "memory", str(100 * _MIB))
    with untouched(scenario, container), _short_of_memory(scenario.b, 100 * _MIB):
        refusal = _by_code(_refused(scenario, "large", "--to", "hostB"))["memory-available"]
    assert refusal["host"] == "hostB"


def test_a_target_without_the_runtime_is_refused(scenario: Scenario, ip: str):
    container = _add(scenario, "runcs", ip)
    settings = scenario.b.persist / "etc/migrate/agent.toml"
    original = settings.read_text()
    scenario.b.stop_agent()
    settings.write_text(original.replace('kind = "runc"', 'kind = "crun"').replace("/run/runc", "/run/crun"))
    scenario.b.start_agent()
    try:
        with untouched(scenario, container):
            refusal = _by_code(_refused(scenario, "runcs", "--to", "hostB"))["runtime-missing"]
    finally:
        scenario.b.stop_agent()
        settings.write_text(original)
        scenario.b.start_agent()
    assert refusal["host"] == "hostB"
    assert "install runc" in refusal["hint"]


def test_a_target_without_the_bundle_is_refused(scenario: Scenario, ip: str):
    container = scenario.a.add_runc_container("homebody", args=_args(), ip=f"{ip}/24", files=_FILES)
    wait_until(lambda: _count(container) > 0, what="the first line")
    with untouched(scenario, container):
        refusal = _by_code(_refused(scenario, "homebody", "--to", "hostB"))["bundle-missing"]
    assert refusal["host"] == "hostB"
    assert refusal["object"] == "/var/lib/containers-lab/homebody/rootfs"


def test_a_host_with_another_key_is_not_trusted(scenario: Scenario, ip: str):
    container = _add(scenario, "careful", ip)
    other_key = " ".join(make_key(scenario.lab.operator / "other", "other").split()[:2])
    inventory = scenario.lab.operator / "wrong-key.toml"
    inventory.write_text(scenario.lab.inventory_path.read_text().replace(scenario.b.host_key, other_key))
    with untouched(scenario, container):
        done = scenario.migrate(
            "--json", "--inventory", str(inventory), "container", "careful", "--to", "hostB", check=False
        )
    assert done.returncode == 4
    assert '"code":"host-key"' in done.stdout
    assert "migrate hosts trust hostB" in done.stdout


def test_a_host_that_is_not_there_is_said_to_be_out_of_reach(scenario: Scenario, ip: str):
    container = _add(scenario, "lonely", ip)
    inventory = scenario.lab.operator / "with-c.toml"
    text = scenario.lab.inventory_path.read_text()
    described = text[text.index("[hosts.hostB]") :]
    inventory.write_text(text + "\n" + described.replace("hostB", "hostC").replace(scenario.b.address, "10.77.0.13"))
    with untouched(scenario, container):
        done = scenario.migrate(
            "--json", "--inventory", str(inventory), "container", "lonely", "--to", "hostC", check=False
        )
    assert done.returncode == 4
    assert '"code":"unreachable"' in done.stdout
    assert '"host":"hostC"' in done.stdout
    assert "10.77.0.13" in done.stdout


def test_a_name_that_no_host_has_is_refused(scenario: Scenario):
    result = _refused(scenario, "nobody", "--to", "hostB")
    assert result["error"]["code"] == "no-such-container"
    assert "hostA, hostB" in result["error"]["message"]


def test_a_name_that_two_hosts_have_needs_a_from(scenario: Scenario, ip: str):
    container = scenario.a.add_runc_container("twin", args=_args(), ip=f"{ip}/24", files=_FILES)
    other_ip = f"{ip.rpartition('.')[0]}.{int(ip.rpartition('.')[2]) + 100}"
    scenario.b.add_runc_container("twin", args=_args(), ip=f"{other_ip}/24", files=_FILES)
    wait_until(lambda: _count(container) > 0, what="the first line")
    with untouched(scenario, container):
        result = _refused(scenario, "twin", "--to", "hostB", status=2)
        chosen = _refused(scenario, "twin", "--from", "hostA", "--to", "hostB")
    assert result["error"]["code"] == "ambiguous-container"
    assert "--from hostA" in result["error"]["hint"]
    # It went on to the next hindrance.
    assert chosen["source"] == "hostA"
    assert "name-taken" in _by_code(chosen)


def test_a_container_on_its_way_is_refused_to_a_second_coordinator(scenario: Scenario, ip: str):
    scenario.add_redis("busy", ip)
    with RedisLoad(scenario.client, f"{ip}:6379", prefill_mb=16) as load:
        moving = Moving(scenario, "busy", scenario.a, "--bandwidth", "2M")
        row = moving.wait_precopy()
        result = _refused(scenario, "busy", "--to", "hostB", "--from", "hostA")
        moving.process.send_signal(signal.SIGINT)
        assert moving.end()[0] == 130
        assert load.report().replies > 0
    assert result["error"]["code"] == "busy"
    assert row.migration in result["error"]["message"]
    assert re.search(r"started by root@client.* at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", result["error"]["message"])
    assert f"migrate abort {row.migration}" in result["error"]["hint"]


def test_check_and_dry_run_touch_nothing(scenario: Scenario, ip: str):
    container = _add(scenario, "model", ip)
    with untouched(scenario, container):
        checked = scenario.migrate_json("check", "model", "--to", "hostB")
        dry = scenario.migrate_json("container", "model", "--to", "hostB", "--dry-run")
    for outcome in (checked, dry):
        assert outcome["feasible"]
        assert outcome["refusals"] == []
        assert (outcome["source"], outcome["destination"]) == ("hostA", "hostB")
