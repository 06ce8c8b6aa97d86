"""Two fake hosts, hostA with the container web1, and an inventory of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from migrate.cli.group import run
from tests.migrate.fake_agent import FakeAgent, LoopThread


@dataclass
class Fakes:
    """The two agents, and the inventory that a test may write anew."""

    source: FakeAgent
    target: FakeAgent
    inventory: Path
    identity: Path

    def write_inventory(self, **changes: dict[str, Any]) -> None:
        """`changes`: by host name, what differs."""
        lines = ["[defaults]", 'user = "root"', f'identity = "{self.identity}"']
        for agent in (self.source, self.target):
            table = {
                "address": "127.0.0.1",
                "port": agent.port,
                "host_key": agent.host_key.export_public_key().decode().strip(),
            } | changes.get(agent.name, {})
            lines += [f"[hosts.{agent.name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
        self.inventory.write_text("\n".join(lines) + "\n")


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[Fakes]:
    key = asyncssh.generate_private_key("ssh-ed25519")
    identity = tmp_path / "id_ed25519"
    key.write_private_key(str(identity))
    with LoopThread() as thread:
        source = FakeAgent(thread, "hostA", key, containers=("web1",)).start()
        target = FakeAgent(thread, "hostB", key).start()
        fakes = Fakes(source, target, tmp_path / "hosts.toml", identity)
        fakes.write_inventory()
        yield fakes
        source.stop()
        target.stop()


@dataclass
class Ran:
    """What one call of the command line did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def migrate(fakes: Fakes, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Call the command line in this process, with the inventory of the fakes."""

    def call(*arguments: str) -> Ran:
        status = run(["--inventory", str(fakes.inventory), *arguments])
        captured = capfd.readouterr()
        return Ran(status, captured.out, captured.err)

    return call
