"""Live moves: redis under load, and a server with 50 threads, between hosts whose monotonic clocks are hours apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.lab.lab import wait_until
from tests.lab.load import RedisLoad
from tests.lab.scenario import CLOCKS_APART_S, Scenario, wait_for_port

_PROGRAMS = Path(__file__).with_name("programs")
_PORT = 7000


def test_redis_moves_under_load_there_back_and_there_again(scenario: Scenario, ip: str) -> None:
    container = scenario.add_redis("web1", ip)
    pids = container.pids
    with RedisLoad(scenario.client, f"{ip}:6379", prefill_mb=64, dirty_mb_per_s=5) as load:
        port = load.report().local_port
        for target in (scenario.b, scenario.a, scenario.b):
            result = scenario.migrate_json("container", "web1", "--to", target.name)
            assert result["status"] == "completed"
            assert result["destination"] == target.name
            assert result["downtime_ms"] > 0
            assert result["rounds"], "it was to be live, with pre-copy"
            assert sum(result["downtime"].values()) <= result["downtime_ms"] * 1.05
            report = load.report()
            assert report.local_port == port
            assert scenario.where("web1") == [target.name]
            assert target.container("web1").pids == pids
            config = json.loads((target.persist / str(container.bundle).lstrip("/") / "config.json").read_text())
            assert config["process"]["args"][0] == "/usr/bin/redis-server"
            assert "-h" not in config["process"]["args"]
        end = load.stop()
    assert end.keys_read_back > 0
    # What the runtime is asked to do still works on a container that was restored.
    done = scenario.b.run(["runc", "exec", "web1", "/usr/bin/redis-cli", "-h", ip, "dbsize"])
    assert int(done.stdout.split()[-1]) > 0
    scenario.b.run(["runc", "kill", "web1", "TERM"])
    wait_until(lambda: scenario.b.runc_list()["web1"] == "stopped", what="redis ending on SIGTERM")
    scenario.b.run(["runc", "delete", "web1"])


class _Asker:
    """ask.py on the client."""

    def __init__(self, scenario: Scenario, ip: str) -> None:
        self.process = scenario.client.popen(
            [sys.executable, str(_PROGRAMS / "ask.py"), ip, str(_PORT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._line() == "connected\n"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return str(self.process.stdout.readline())

    def ask(self) -> dict[str, Any]:
        """The server's status, over the one connection."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def close(self) -> None:
        """End the client."""
        self.process.communicate(timeout=10)


def test_fifty_threads_in_waits_of_all_kinds_go_on(scenario: Scenario, ip: str) -> None:
    args = ("/usr/bin/python3", "/opt/lab/server.py", str(_PORT))
    container = scenario.add_container("threads", args, ip, files={"/opt/lab/server.py": _PROGRAMS / "server.py"})
    wait_for_port(scenario.client, ip, _PORT)
    asker = _Asker(scenario, ip)
    try:
        first = asker.ask()
        assert first["threads"] > 50
        for target in (scenario.b, scenario.a):
            before = asker.ask()
            assert scenario.migrate_json("container", "threads", "--to", target.name)["status"] == "completed"
            after = asker.ask()
            assert set(before["tids"]) <= set(after["tids"])
            assert after["pid"] == before["pid"]
            passed_s = after["monotonic_s"] - before["monotonic_s"]
            assert 0 < passed_s < CLOCKS_APART_S / 10, "the container's monotonic clock jumped"

            def all_moved(then: dict[str, Any] = after) -> bool:
                now = asker.ask()
                assert now["faults"] == []
                going = all(new > old + 2 for new, old in zip(now["rounds"], then["rounds"], strict=True))
                return going and now["alarms"] > then["alarms"] + 2

            wait_until(all_moved, timeout_s=30, what="every thread and the interval timer")
            assert scenario.where("threads") == [target.name]
        assert scenario.a.container("threads").pids == container.pids
    finally:
        asker.close()
