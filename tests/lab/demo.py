"""`make demo`: a redis with 256 MB moves between two hosts, back, and once more, while a client writes and reads."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time

from tests.lab.containers import ContainerHost
from tests.lab.host import BIN
from tests.lab.load import LoadReport, RedisLoad
from tests.lab.scenario import CLOCKS_APART_S, REDIS_PORT, Scenario, two_hosts

_MEMORY_MB = 256
_IP = "10.77.0.50"
_AFTERWARDS_S = 1.5  # the client goes on for this long, so that a late stall shows in its figures


def say(text: str = "") -> None:
    """One line, at once: what runs below prints to the same terminal."""
    print(text, flush=True)


def show(host: ContainerHost, *command: str) -> str:
    """Run a command on a host, and show both."""
    out = host.run(command).stdout.rstrip()
    say(f"{host.name}# {shlex.join(command)}")
    for line in out.splitlines():
        say(f"    {line}")
    return out


def migrate(scenario: Scenario, *arguments: str) -> None:
    """`migrate` with the operator's own terminal."""
    say(f"operator$ migrate {shlex.join(arguments)}")
    process = scenario.client.popen([BIN / "migrate", *arguments], stdin=subprocess.DEVNULL)
    if process.wait() != 0:
        raise SystemExit(f"migrate ended with {process.returncode}; the agents' logs:\n{logs(scenario)}")


def logs(scenario: Scenario) -> str:
    """The end of both agents' logs."""
    return "\n".join(
        f"--- {host.name}\n{host.agent_log.read_text(errors='replace')[-3000:]}" for host in (scenario.a, scenario.b)
    )


def prove(scenario: Scenario, pids: list[int], target: ContainerHost, load: RedisLoad, port: int) -> None:
    """Everything that has to be as it was, looked at from outside."""
    time.sleep(_AFTERWARDS_S)
    report: LoadReport = load.report()
    say(
        f"client: the same connection (local port {report.local_port}), {report.replies} replies since, every one right,"
    )
    say(f"        longest wait for a reply {report.max_gap_ms:.1f} ms (median {report.p50_ms:.2f} ms)")
    after = target.container("web1")
    config = json.loads((target.persist / str(after.bundle).lstrip("/") / "config.json").read_text())
    facts = {
        "the same connection": report.local_port == port,
        "pids in the container as before": after.pids == pids,
        "the original config.json in the bundle": config["process"]["args"][1:3] == ["--bind", "0.0.0.0"],
        f"it runs on {target.name} and nowhere else": scenario.where("web1") == [target.name],
    }
    for host in (scenario.a, scenario.b):
        show(host, "runc", "list")
    for fact, holds in facts.items():
        say(f"  {'yes' if holds else 'NO '}  {fact}")
    if not all(facts.values()):
        raise SystemExit("the demo failed: see NO above")


def main() -> int:
    """The whole story."""
    started = time.monotonic()
    say(
        "Two hosts of namespaces on this machine, joined by a LAN: hostA, hostB (each with its own network, mounts, pids,"
    )
    say(
        f"cgroups, disk and a monotonic clock {CLOCKS_APART_S} s apart), an agent on each, and an operator with a client."
    )
    with two_hosts() as scenario:
        pids = scenario.add_redis().pids
        say(
            f"\nA redis runs in runc container web1 on hostA; a client fills it with {_MEMORY_MB} MB, then writes and reads"
        )
        say("over ONE TCP connection, one request each millisecond, all the time from here on.\n")
        with RedisLoad(scenario.client, f"{_IP}:{REDIS_PORT}", prefill_mb=_MEMORY_MB) as load:
            port = load.report().local_port
            show(scenario.a, "runc", "list")
            for target in (scenario.b, scenario.a, scenario.b):
                say()
                migrate(scenario, "container", "web1", "--to", target.name)
                say()
                prove(scenario, pids, target, load, port)
            end = load.stop()
            say(f"\nclient: done. {end.keys_read_back} acknowledged writes were read back, none is missing.")
    say(f"The demo took {time.monotonic() - started:.0f} s; nothing of it is left.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
