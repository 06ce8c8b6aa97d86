"""An agent that starts settles what one before it left: the journal says where each migration stood.

The rows are made by the test, as an agent that was killed at that moment would have left them.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.journal import Journal, Undo
from agent.kernel.freezer import Freezer
from protocol import messages as m
from protocol.states import Event, Side, State
from tests.agent.coordinator import session
from tests.agent.inside import call, without_network
from tests.lab import Lab
from tests.lab.containers import Container, ContainerHost

pytestmark = pytest.mark.root

ID = "restart-1"
SOURCE = [Event.ARMED, Event.FREEZE, Event.RESTORED, Event.COMMIT, Event.RUNNING]
TARGET = [Event.ARMED, Event.FREEZE, Event.RESTORED, Event.COMMIT]


class Left:
    """A host on which an agent was killed in the middle of something."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.host: ContainerHost = lab.add_host(name)
        self.host.install_agent([lab.public_key])
        self.journal = Journal(self.host.persist / "var/lib/migrate")

    def container(self, *, start: bool = True, name: str = "web1") -> Container:
        bundle = self.host.make_bundle(name, args=["sleep", "600"], edit=without_network)
        command = ["runc", "--root", "/run/runc", *(["run", "--detach"] if start else ["create"])]
        script = 'exec "$@" </dev/null >/tmp/log 2>&1'
        self.host.run(["sh", "-c", script, "sh", *command, "--bundle", str(bundle), name])
        return self.host.container(name)

    def freeze(self, container: Container) -> list[str]:
        """Freeze its cgroup; the paths are those that an agent in the host uses."""
        paths: list[str] = call(
            self.host,
            "from agent.kernel.freezer import Freezer\n"
            f"freezer = Freezer.of({container.pid_in_host})\n"
            "freezer.freeze()\nfreezer.wait_frozen(5)\nresult = freezer.paths",
        )
        return paths

    def facts(self, paths: list[str], container: Container | None = None) -> dict[str, Any]:
        pids = [container.pid_in_host] if container else []
        return {
            "freezer": paths, "pids": pids, "runtime": ["runc", "/run/runc", "web1"], "cuts": [], "namespace": "",
            "repaired": [], "host_names": [], "bridge": "cbr0",
        }  # fmt: skip

    def row(
        self, side: Side, events: list[Event], *, undo: tuple[Undo, ...] = (), facts: dict[str, Any] | None = None
    ) -> None:
        self.journal.begin(
            migration=ID, side=side, epoch=1, container="web1", peer="other", coordinator="ann", facts=facts
        )
        self.journal.undo_ahead(ID, side, *undo)
        if events:
            self.journal.move(ID, side, *events)

    def state(self, side: Side) -> State:
        entry = self.journal.find(ID, side)
        assert entry is not None
        return entry.state

    def start(self) -> str:
        """Start the agent; what it says. It listens only after everything was settled."""
        self.host.start_agent()
        text = self.host.agent_log.read_text()
        assert "Traceback" not in text
        return text

    def is_frozen(self, paths: list[str]) -> bool:
        program = f"from agent.kernel.freezer import Freezer\nresult = Freezer.at({paths!r}).is_frozen()"
        return bool(call(self.host, program))

    def ask(self, body: m.Message) -> Any:
        async def main() -> Any:
            async with asyncio.timeout(30), session(self.host, self.lab.identity) as agent:
                await agent.hello()
                return await agent.ask(body)

        return asyncio.run(main())

    def has_ended(self, container: Container) -> bool:
        return not Path(f"/proc/{container.pid}/exe").exists()


@pytest.fixture
def left(lab: Lab) -> Iterator[Left]:
    made = Left(lab, f"host{len(lab.hosts)}")
    yield made
    made.journal.close()
    # Each test has a host of its own; what stands frozen in it goes with it.
    lab.power_cut(made.host)


# ---------------------------------------------------------------- the source


@pytest.mark.parametrize("events", [SOURCE[:2], SOURCE[:3]], ids=["cut-over", "restored"])
def test_a_frozen_source_without_commit_runs_on_and_is_aborted(left: Left, events: list[Event]):
    container = left.container()
    paths = left.freeze(container)
    undo = (Undo("thaw", {"paths": paths}), Undo("repair-off", {"pids": [container.pid_in_host]}))
    left.row(Side.SOURCE, events, undo=undo, facts=left.facts(paths, container))
    said = left.start()
    assert left.state(Side.SOURCE) is State.ABORTED
    assert not left.is_frozen(paths)
    assert left.journal.pending_undo(ID, Side.SOURCE) == []
    assert left.host.runc_list() == {"web1": "running"}
    assert f"{ID}: undone" in said


@pytest.mark.parametrize("events", [[], SOURCE[:1]], ids=["preparing", "pre-copy"])
def test_a_source_before_the_freeze_is_aborted_and_was_never_touched(left: Left, events: list[Event]):
    left.container()
    left.row(Side.SOURCE, events)
    left.start()
    assert left.state(Side.SOURCE) is State.ABORTED
    assert left.host.runc_list() == {"web1": "running"}
    entry = left.journal.find(ID, Side.SOURCE)
    assert entry is not None
    assert entry.detail == "the agent was restarted"


def test_a_committed_source_stays_frozen_until_the_target_is_heard(left: Left):
    container = left.container()
    paths = left.freeze(container)
    left.row(Side.SOURCE, SOURCE[:4], facts=left.facts(paths, container))
    said = left.start()
    assert left.state(Side.SOURCE) is State.COMMITTED
    assert left.is_frozen(paths)
    assert "stays frozen until the target is heard: migrate recover" in said
    refused = left.ask(m.BeginSource(migration="next-1", epoch=1, container="web1", target="b"))
    assert refused.code == "busy"


def test_a_committed_source_deletes_its_copy_when_the_target_runs(left: Left):
    container = left.container()
    paths = left.freeze(container)
    left.row(Side.SOURCE, SOURCE[:4], facts=left.facts(paths, container))
    left.start()
    assert left.ask(m.Settle(migration=ID, epoch=1, peer_state="running")) == m.Done(detail="finished")
    assert left.has_ended(container)
    assert left.host.runc_list() == {}
    assert left.ask(m.Settle(migration=ID, epoch=1, peer_state="running")) == m.Done(detail="finished")


def test_a_committed_source_is_taken_back_into_service_when_the_target_discarded(left: Left):
    container = left.container()
    paths = left.freeze(container)
    left.row(Side.SOURCE, SOURCE[:4], facts=left.facts(paths, container))
    left.start()
    assert left.ask(m.Settle(migration=ID, epoch=1, peer_state="discarded")) == m.Done(detail="reclaimed")
    assert not left.is_frozen(paths)
    assert left.host.runc_list() == {"web1": "running"}


@pytest.mark.parametrize("peer_state", ["restored", "precopy", "unknown"])
def test_a_committed_source_does_nothing_on_a_word_that_decides_nothing(left: Left, peer_state: str):
    container = left.container()
    paths = left.freeze(container)
    left.row(Side.SOURCE, SOURCE[:4], facts=left.facts(paths, container))
    left.start()
    answer = left.ask(m.Settle(migration=ID, epoch=1, peer_state=peer_state))
    assert isinstance(answer, m.Failure)
    assert left.state(Side.SOURCE) is State.COMMITTED
    assert left.is_frozen(paths)


def test_a_source_that_heard_running_cleans_up(left: Left):
    container = left.container()
    paths = left.freeze(container)
    left.row(Side.SOURCE, SOURCE, facts=left.facts(paths, container))
    left.start()
    assert left.state(Side.SOURCE) is State.FINISHED
    assert left.has_ended(container)
    assert left.host.runc_list() == {}


def test_a_source_whose_tasks_are_gone_waits_for_the_other_side(left: Left):
    """Its machine was down: a target in RESTORED has the only copy then."""
    left.row(Side.SOURCE, SOURCE[:2], facts=left.facts(["/sys/fs/cgroup/freezer/no-such-group"]))
    said = left.start()
    assert left.state(Side.SOURCE) is State.CUT_OVER
    assert f"the other side must be heard: migrate recover {ID}" in said


def test_a_source_that_was_declared_dead_kills_its_copy(left: Left):
    container = left.container()
    paths = left.freeze(container)
    left.row(Side.SOURCE, SOURCE[:4], facts=left.facts(paths, container))
    left.start()
    assert left.ask(m.Settle(migration=ID, epoch=2, peer_state="forced")) == m.Done(detail="superseded")
    assert left.has_ended(container)
    assert left.host.runc_list() == {}


# ---------------------------------------------------------------- the target


def test_a_target_in_preparation_is_removed_whole(left: Left):
    container = left.container(start=False)
    config = left.host.persist / str(container.bundle).lstrip("/") / "config.json"
    original = config.read_text()
    config.write_text(json.dumps(json.loads(original) | {"hostname": "intercepted"}))
    undo = (
        Undo("restore-config", {"bundle": str(container.bundle), "config": original}),
        Undo("delete-container", {"kind": "runc", "root": "/run/runc", "name": "web1"}),
    )
    left.row(Side.TARGET, [], undo=undo)
    left.start()
    assert left.state(Side.TARGET) is State.DISCARDED
    assert left.host.runc_list() == {}
    assert left.has_ended(container)
    assert config.read_text() == original
    assert left.journal.pending_undo(ID, Side.TARGET) == []


def test_a_restored_target_stays_frozen_and_asks(left: Left):
    container = left.container()
    paths = left.freeze(container)
    undo = (Undo("delete-container", {"kind": "runc", "root": "/run/runc", "name": "web1"}),)
    left.row(Side.TARGET, TARGET[:3], undo=undo, facts=left.facts(paths))
    said = left.start()
    assert left.state(Side.TARGET) is State.RESTORED
    assert left.is_frozen(paths)
    assert "the other side must be heard" in said


def test_a_restored_target_whose_tasks_are_gone_is_discarded(left: Left):
    container = left.container(start=False)
    undo = (Undo("delete-container", {"kind": "runc", "root": "/run/runc", "name": "web1"}),)
    left.row(Side.TARGET, TARGET[:3], undo=undo, facts=left.facts(["/sys/fs/cgroup/freezer/no-such-group"]))
    left.start()
    assert left.state(Side.TARGET) is State.DISCARDED
    assert left.host.runc_list() == {}
    assert left.has_ended(container)


@pytest.mark.parametrize(
    ("settle", "ends", "runs"),
    [
        (m.Settle(migration=ID, epoch=1, peer_state="committed"), "finished", True),
        (m.Settle(migration=ID, epoch=1, peer_state="unknown", source_is_dead=True), "finished", True),
        (m.Settle(migration=ID, epoch=1, peer_state="aborted"), "discarded", False),
        (m.Settle(migration=ID, epoch=1, peer_state="aborted", source_is_dead=True), "discarded", False),
    ],
    ids=["committed", "source is dead", "aborted", "said dead but aborted"],
)
def test_a_restored_target_does_what_the_sources_journal_says(left: Left, settle: m.Settle, ends: str, runs: bool):
    container = left.container()
    paths = left.freeze(container)
    undo = (Undo("delete-container", {"kind": "runc", "root": "/run/runc", "name": "web1"}),)
    left.row(Side.TARGET, TARGET[:3], undo=undo, facts=left.facts(paths))
    left.start()
    assert left.ask(settle) == m.Done(detail=ends)
    assert left.host.runc_list() == ({"web1": "running"} if runs else {})
    assert left.has_ended(container) is not runs
    if runs:
        assert not left.is_frozen(paths)
    entry = left.journal.find(ID, Side.TARGET)
    assert entry is not None
    assert entry.epoch == (2 if settle.source_is_dead and runs else 1)


def test_a_target_that_wrote_running_and_was_killed_before_the_thaw_runs(left: Left):
    container = left.container()
    paths = left.freeze(container)
    left.row(Side.TARGET, TARGET, facts=left.facts(paths))
    said = left.start()
    assert left.state(Side.TARGET) is State.FINISHED
    assert not left.is_frozen(paths)
    assert f"{ID}: web1 runs here" in said


# ---------------------------------------------------------------- several agents, several starts


def test_what_another_living_agent_drives_is_left_alone_and_settled_after_its_death(left: Left):
    program = (
        "import pathlib, sys; from agent.journal import Journal; from protocol.states import Side;"
        f"Journal(pathlib.Path('/var/lib/migrate')).begin(migration={ID!r}, side=Side.TARGET, epoch=1,"
        "container='web1', peer='', coordinator=''); print(flush=True); sys.stdin.read()"
    )
    with left.host.popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        left.start()
        assert left.state(Side.TARGET) is State.PREPARING
        left.host.kill_agent()
        other.kill()
    left.start()
    assert left.state(Side.TARGET) is State.DISCARDED


def test_an_undo_that_fails_is_tried_again_at_the_next_start(left: Left):
    container = left.container()
    bundle = f"{left.host.root}/tmp/late"
    undo = (
        Undo("delete-container", {"kind": "runc", "root": "/run/runc", "name": "web1"}),
        Undo("restore-config", {"bundle": "/tmp/late", "config": "{}"}),
    )
    left.row(Side.TARGET, [], undo=undo)
    said = left.start()
    # One that fails keeps none of the others from being done.
    assert f"{ID}: undone, except restore-config: " in said
    assert left.has_ended(container)
    assert [item.kind for item in left.journal.pending_undo(ID, Side.TARGET)] == ["restore-config"]
    left.host.stop_agent()
    Path(bundle).mkdir()
    left.start()
    assert left.journal.pending_undo(ID, Side.TARGET) == []
    assert Path(bundle, "config.json").read_text() == "{}"


def test_a_restart_after_a_restart_changes_nothing(left: Left):
    container = left.container()
    paths = left.freeze(container)
    left.row(Side.SOURCE, SOURCE[:4], facts=left.facts(paths, container))
    for _ in range(2):
        left.start()
        left.host.kill_agent()
    assert left.state(Side.SOURCE) is State.COMMITTED
    assert left.is_frozen(paths)


def test_a_freezer_is_found_again_by_its_path_and_gone_with_its_group(left: Left):
    container = left.container()
    paths = left.freeze(container)
    mine = Freezer.of(container.pid)
    assert mine.is_frozen()
    assert Freezer.at(mine.paths) == mine
    assert mine.processes() == [container.pid]
    assert left.is_frozen(paths)
    mine.thaw()
    assert not left.is_frozen(paths)
