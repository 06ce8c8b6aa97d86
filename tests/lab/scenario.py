"""Two hosts, a client, a container that is at home on one of them and has its files on both: demo, tests, benchmark."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.lab.containers import Container, ContainerHost
from tests.lab.host import BIN
from tests.lab.lab import Lab

# Far apart, so that a timer that was carried by the wrong clock is off by hours.
CLOCKS_APART_S = 5000
REDIS_PORT = 6379
REDIS = (
    "/usr/bin/redis-server", "--bind", "0.0.0.0", "--port", str(REDIS_PORT), "--save", "", "--appendonly", "no",
    "--protected-mode", "no", "--dir", "/",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scenario:
    """hostA and hostB with agents, and the client, where operator and load are."""

    lab: Lab
    a: ContainerHost
    b: ContainerHost
    client: ContainerHost

    def add_container(self, name: str, args: Sequence[str], ip: str, **bundle: Any) -> Container:
        """Runs on hostA; the same files lie on hostB, as copies of their own."""
        self.b.make_bundle(name, args=args, **bundle)
        return self.a.add_runc_container(name, args=args, ip=f"{ip}/24", **bundle)

    def add_redis(self, name: str = "web1", ip: str = "10.77.0.50", **bundle: Any) -> Container:
        """A redis that keeps everything in memory."""
        container = self.add_container(name, REDIS, ip, **bundle)
        wait_for_port(self.client, ip, REDIS_PORT)
        return container

    def migrate(
        self, *arguments: str, check: bool = True, timeout_s: float = 120, **popen: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `migrate ARGUMENTS` on the client, as the operator does."""
        return self.client.run([BIN / "migrate", *arguments], check=check, timeout_s=timeout_s, **popen)

    def migrate_json(self, *arguments: str, status: int = 0) -> dict[str, Any]:
        """The result object of `migrate --json ARGUMENTS`, which must end with `status`."""
        done = self.migrate("--json", *arguments, check=False)
        assert done.returncode == status, f"status {done.returncode}, not {status}\n{done.stdout}\n{done.stderr}"
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def where(self, name: str) -> list[str]:
        """Names of the hosts on which runc says that the container runs."""
        return [host.name for host in (self.a, self.b) if host.runc_list().get(name) == "running"]


def wait_for_port(client: ContainerHost, ip: str, port: int) -> None:
    """Until somebody answers there."""
    script = (
        "import socket,sys,time\n"
        "end=time.monotonic()+20\n"
        "while True:\n"
        "    try: socket.create_connection((sys.argv[1],int(sys.argv[2])),1).close(); break\n"
        "    except OSError:\n"
        "        if time.monotonic()>end: raise\n"
        "        time.sleep(0.02)\n"
    )
    client.run(["/usr/bin/python3", "-c", script, ip, str(port)])


@contextlib.contextmanager
def two_hosts(
    *, agents: bool = True, agentless: bool = False, agent_env: Mapping[str, str] | None = None
) -> Iterator[Scenario]:
    """The scenario, gone at the end of the block."""
    with Lab() as lab:
        a = lab.add_host("hostA")
        b = lab.add_host("hostB", monotonic_offset_s=CLOCKS_APART_S)
        client = lab.add_client()
        for host in (a, b):
            host.env.update(agent_env or {})
        if agents:
            lab.install_agents(agentless=agentless)
        yield Scenario(lab, a, b, client)
