"""A one-process counter moves by stop-copy over the real data link, there and back."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.lab.containers import ContainerHost
from tests.lab.lab import wait_until
from tests.lab.scenario import Scenario

_COUNTER = ("/usr/bin/python3", "/opt/lab/counter.py")
_LINE = re.compile(r"(\d+) (\d+\.\d+)")


def _lines(path: Path) -> list[tuple[int, float]]:
    return [(int(n), float(t)) for n, t in _LINE.findall(path.read_text())] if path.exists() else []


def _moved_log(host: ContainerHost, name: str) -> Path:
    """Where the target's agent lets a container's stdout go."""
    return host.persist / "var/lib/migrate/logs" / f"{name}.log"


def test_a_counter_moves_by_stop_copy_there_and_back(scenario: Scenario, ip: str) -> None:
    container = scenario.add_container("counter", _COUNTER, ip)
    wait_until(lambda: len(_lines(container.log)) > 3, what="the counter")

    there = scenario.migrate_json("container", "counter", "--to", "hostB", "--strategy", "stop-copy")
    assert there["status"] == "completed"
    at_b = _moved_log(scenario.b, "counter")
    wait_until(lambda: len(_lines(at_b)) > 3, what="the counter on hostB")
    assert scenario.where("counter") == ["hostB"]
    assert "counter" not in scenario.a.runc_list()

    back = scenario.migrate_json("container", "counter", "--to", "hostA", "--strategy", "stop-copy")
    assert back["status"] == "completed"
    at_a = _moved_log(scenario.a, "counter")
    wait_until(lambda: len(_lines(at_a)) > 3, what="the counter on hostA again")
    assert scenario.where("counter") == ["hostA"]

    counted = [*_lines(container.log), *_lines(at_b), *_lines(at_a)]
    assert [number for number, _ in counted] == list(range(counted[0][0], counted[0][0] + len(counted)))
    times = [at for _, at in counted]
    assert times == sorted(times), "CLOCK_MONOTONIC went back"
    # The hosts' clocks are hours apart; the container's went on.
    assert times[-1] - times[0] < 60
    config = json.loads((scenario.a.persist / str(container.bundle).lstrip("/") / "config.json").read_text())
    assert config["process"]["args"] == list(_COUNTER)
