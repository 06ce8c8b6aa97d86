"""Source and target when things come at the wrong moment: nothing leaks, nothing stays frozen, nothing runs twice."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from agent import reclaim, source, target
from agent.engine import base
from agent.journal import Journal, Undo
from agent.journal import _start_time as start_time
from agent.service import Service, Session
from agent.undo import read_config, run_pending, write_config
from agent.worker import Workers
from protocol import link_messages as link
from protocol import messages as m
from protocol.connection import Connection, Role
from protocol.errors import (
    AbortedError,
    InDoubtError,
    KernelError,
    MigrateError,
    NotConvergedError,
    UsageError,
    error_from_wire,
)
from protocol.states import Event, Side, State
from tests.agent.side_rig import ID, Network, SideRig

CONNECT = m.ConnectSource(migration=ID, address="10.0.0.2", port=7100, host_key="ssh-ed25519 AAAA")
CUT_OVER = m.CutOver(migration=ID, freeze_budget_s=2.0)

Story = Callable[[SideRig], Coroutine[Any, Any, None]]


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Story], None]:
    """Run a story with a rig, bounded; no task's failure goes unheard."""

    def run(story: Story) -> None:
        unheard: list[dict[str, Any]] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
            rig = SideRig(tmp_path, monkeypatch)
            try:
                async with asyncio.timeout(20):
                    await story(rig)
            finally:
                rig.journal.close()

        asyncio.run(main())
        assert not unheard

    return run


async def until(fact: Callable[[], object]) -> None:
    while not fact():  # noqa: ASYNC110  (facts of the log have no event)
        await asyncio.sleep(0)


async def precopy(rig: SideRig) -> source.SourceMigration:
    migration = rig.source()
    await migration.begin()
    await migration.connect(CONNECT)
    return migration


async def committed(rig: SideRig) -> source.SourceMigration:
    """The source has committed and heard nothing from the target."""
    migration = await precopy(rig)
    rig.dumped()
    rig.link_restored()
    cutting = asyncio.create_task(migration.cut_over(CUT_OVER))
    await until(lambda: rig.sent(link.LinkCommit))
    rig.live.link.fail(MigrateError("the link broke", code="link-lost"), lasting=True)
    assert (await cutting).outcome == "in-doubt"
    return migration


async def waiting(rig: SideRig, *networks: Network) -> target.TargetMigration:
    """The target is in RESTORED."""
    migration = rig.target()
    await migration.prepare("")
    migration._networks = list(networks)  # type: ignore[arg-type]
    rig.restored()
    await until(lambda: rig.sent(link.LinkRestored))
    return migration


# ---------------------------------------------------------------- while it is being begun


def test_a_source_that_is_aborted_while_it_begins_leaves_no_process(tell):
    async def story(rig: SideRig) -> None:
        migration = rig.source()
        rig.may_start_workers.clear()
        beginning = asyncio.create_task(migration.begin())
        await rig.starting.wait()
        aborting = asyncio.create_task(migration.abort("enough"))
        await asyncio.sleep(0)
        rig.may_start_workers.set()
        with pytest.raises(AbortedError, match="enough"):
            await beginning
        await aborting
        assert rig.state(Side.SOURCE) is State.ABORTED
        assert len(rig.started) == 1
        assert rig.all_closed()

    tell(story)


@pytest.mark.parametrize("how", ["abort", "engine lost"])
def test_a_target_that_ends_while_its_container_is_made_removes_it(tell, how: str):
    async def story(rig: SideRig) -> None:
        migration = rig.target()
        rig.runtime.may_create.clear()
        preparing = asyncio.create_task(migration.prepare(""))
        await asyncio.to_thread(rig.runtime.creating.wait, 10)
        ending = asyncio.create_task(migration.abort("enough")) if how == "abort" else None
        if ending is None:
            migration._lost(MigrateError("the engine died", code="process-gone"))
        await asyncio.sleep(0.05)
        assert rig.state(Side.TARGET) is State.PREPARING
        rig.runtime.may_create.set()
        with pytest.raises(MigrateError, match="enough" if ending else "the engine died"):
            await preparing
        if ending:
            await ending
        assert rig.state(Side.TARGET) is State.DISCARDED
        assert rig.runtime.there == set()
        assert (rig.bundle / "config.json").read_text() == rig.config
        assert rig.journal.pending_undo(ID, Side.TARGET) == []
        assert rig.all_closed()

    tell(story)


def test_a_session_that_ends_while_a_source_begins_ends_that_source(tell):
    async def story(rig: SideRig) -> None:
        service = Service(rig.host)
        session = Session(service, write=lambda _: None, role="operate", peer="ann", peer_address="")
        coordinator = Connection(Role.COORDINATOR)
        sent = coordinator.send(m.Request(number=1, body=m.Hello(versions=[1])))
        reads = [sent]

        async def read() -> bytes:
            await asyncio.sleep(0)
            return reads.pop(0) if reads else b""

        rig.may_start_workers.clear()
        begin = m.BeginSource(migration=ID, epoch=1, container="web1", target="hostB")
        session._tasks.add(asyncio.create_task(session._answer(m.Request(number=2, body=begin))))
        running = asyncio.create_task(session.run(read))
        await rig.starting.wait()
        await asyncio.sleep(0.05)
        rig.may_start_workers.set()
        await running
        assert rig.state(Side.SOURCE) is State.ABORTED
        assert rig.all_closed()

    tell(story)


def test_one_that_begins_is_kept_when_another_comes(tell):
    async def story(rig: SideRig) -> None:
        service = Service(rig.host)
        first = rig.source()
        service.add(first)
        second = source.SourceMigration(
            rig.host, m.BeginSource(migration="side-test-2", epoch=1, container="web2", target="hostB"), "ann"
        )
        service.add(second)
        assert service.source(ID) is first
        with pytest.raises(UsageError, match="under way already"):
            service.add(rig.source())
        assert service.source(ID) is first

    tell(story)


def test_a_source_address_that_is_none_is_refused(tell):
    async def story(rig: SideRig) -> None:
        with pytest.raises(UsageError, match="is not an IP address"):
            await rig.target().prepare("not an address")
        assert rig.journal.entries() == []

    tell(story)


# ---------------------------------------------------------------- the freeze


def test_a_failure_that_nobody_foresaw_thaws_the_container(tell):
    async def story(rig: SideRig) -> None:
        migration = await precopy(rig)
        rig.engine[base.SourceVerifyStop] = ZeroDivisionError("a bug")
        rig.dumped()
        report = await migration.cut_over(CUT_OVER)
        assert report.outcome == "rolled-back"
        assert report.error is not None
        assert "ZeroDivisionError: a bug" in report.error.message
        assert rig.state(Side.SOURCE) is State.ABORTED
        assert rig.log[-1] == "thawed"
        assert rig.all_closed()

    tell(story)


def test_an_engine_that_never_freezes_is_given_up(tell, monkeypatch: pytest.MonkeyPatch):
    async def story(rig: SideRig) -> None:
        monkeypatch.setattr(source, "_READY_TO_FREEZE_S", 0.05)
        migration = await precopy(rig)
        rig.engine[base.SourceCutOver] = None
        report = await migration.cut_over(m.CutOver(migration=ID, freeze_budget_s=0.05))
        assert report.error is not None
        assert isinstance(
            error_from_wire(family=report.error.family, code="", message="", host="", hint=""), NotConvergedError
        )
        assert rig.state(Side.SOURCE) is State.ABORTED

    tell(story)


def test_a_full_disk_keeps_no_container_frozen(tell, monkeypatch: pytest.MonkeyPatch):
    async def story(rig: SideRig) -> None:
        migration = await precopy(rig)
        move = Journal.move

        def full(self: Journal, migration: str, side: Side, *events: Event, **rest: Any) -> State:
            if Event.ABORT in events:
                raise MigrateError("the journal cannot be written: disk is full", code="journal")
            return move(self, migration, side, *events, **rest)

        monkeypatch.setattr(Journal, "move", full)
        rig.engine[base.SourceVerifyStop] = MigrateError("no")
        rig.dumped()
        with pytest.raises(InDoubtError, match="disk is full"):
            await migration.cut_over(CUT_OVER)
        assert rig.log[-1] == "thawed"
        assert rig.state(Side.SOURCE) is State.CUT_OVER

    tell(story)


def test_an_undo_that_cannot_be_forgotten_keeps_no_other_from_being_done(tell, monkeypatch: pytest.MonkeyPatch):
    async def story(rig: SideRig) -> None:
        rig.journal.begin(migration=ID, side=Side.SOURCE, epoch=1, container="web1", peer="", coordinator="")
        rig.journal.undo_ahead(ID, Side.SOURCE, Undo("thaw", {"paths": ["/a"]}), Undo("thaw", {"paths": ["/b"]}))

        def full(_: Journal, *numbers: int) -> None:
            raise MigrateError("the journal cannot be written: disk is full", code="journal")

        monkeypatch.setattr(Journal, "forget_undo", full)
        failures = run_pending(rig.host.state_dir, ID, Side.SOURCE)
        assert len(failures) == 2
        assert rig.log == ["thawed", "thawed"]

    tell(story)


def test_two_aborts_in_the_freeze_are_one(tell):
    async def story(rig: SideRig) -> None:
        migration = await precopy(rig)
        rig.dumped()
        cutting = asyncio.create_task(migration.cut_over(CUT_OVER))
        await until(lambda: "SourceVerifyStop" in rig.log)
        await asyncio.gather(migration.abort("enough"), migration.abort("really"))
        report = await cutting
        assert (report.outcome, report.error and report.error.family) == ("rolled-back", "aborted")
        assert rig.state(Side.SOURCE) is State.ABORTED
        assert rig.log[-1] == "thawed"

    tell(story)


def test_an_abort_that_comes_after_the_commit_is_refused(tell):
    async def story(rig: SideRig) -> None:
        migration = await precopy(rig)
        rig.dumped()
        rig.link_restored()
        cutting = asyncio.create_task(migration.cut_over(CUT_OVER))
        await until(lambda: rig.sent(link.LinkCommit))
        rig.live.link.put(link.LinkRunning(migration=ID))
        assert (await cutting).outcome == "running"
        with pytest.raises(MigrateError, match="past its commit point") as caught:
            await migration.abort("enough")
        assert caught.value.code == "committed"
        await migration.finish()
        assert rig.state(Side.SOURCE) is State.FINISHED

    tell(story)


# ---------------------------------------------------------------- after the commit


def test_a_source_that_is_told_of_running_lets_its_engine_forget_the_dead(tell):
    """If the engine were ended first, it would put the network and the sockets back, and their end would be heard."""

    async def story(rig: SideRig) -> None:
        migration = await committed(rig)
        assert await migration.settle(State.RUNNING, 1) is State.FINISHED
        done = [item for item in rig.log if isinstance(item, str)]
        order = ["kill_source_copy", "SourceRelease", "delete_source_container", "forget_source_network"]
        assert [item for item in done if item in order] == order
        assert rig.all_closed()

    tell(story)


def test_without_an_engine_the_network_of_a_dead_copy_goes_first(tell):
    async def story(rig: SideRig) -> None:
        await committed(rig)
        assert await reclaim.settle_source(rig.host, ID, State.RUNNING, 1) is State.FINISHED
        assert rig.log[-3:] == ["forget_source_network", "kill_source_copy", "delete_source_container"]

    tell(story)


def test_a_higher_epoch_alone_kills_nothing(tell):
    async def story(rig: SideRig) -> None:
        migration = await precopy(rig)
        await migration.abort("enough")
        assert await migration.settle(State.DISCARDED, 7) is State.ABORTED
        assert "kill_source_copy" not in rig.log

    tell(story)


def test_a_source_that_was_down_in_its_freeze_is_over_when_the_target_discarded(tell, monkeypatch: pytest.MonkeyPatch):
    async def story(rig: SideRig) -> None:
        rig.journal.begin(
            migration=ID, side=Side.SOURCE, epoch=1, container="web1", peer="", coordinator="",
            facts={"freezer": ["/gone"]},
        )  # fmt: skip
        rig.journal.move(ID, Side.SOURCE, Event.ARMED, Event.FREEZE)
        monkeypatch.setattr(reclaim, "tasks_alive", lambda _: True)
        with pytest.raises(InDoubtError):
            await reclaim.settle_source(rig.host, ID, State.DISCARDED, 1)
        monkeypatch.setattr(reclaim, "tasks_alive", lambda _: False)
        assert await reclaim.settle_source(rig.host, ID, State.DISCARDED, 1) is State.ABORTED

    tell(story)


def test_a_target_whose_network_fails_at_the_commit_runs_and_says_so(tell, monkeypatch: pytest.MonkeyPatch):
    async def story(rig: SideRig) -> None:
        monkeypatch.setattr(target, "_LISTEN_AFTER_RUNNING_S", 0.0)
        migration = await waiting(rig, Network(rig.log, KernelError("RTM_SETLINK(mg1)", 19, "no such device")))
        rig.live.link.put(link.LinkCommit(migration=ID, epoch=1))
        await until(lambda: rig.sent(link.LinkRunning))
        assert "thawed" in rig.log
        with pytest.raises(MigrateError, match=r"not all of it works.*no such device") as caught:
            await migration.finish()
        assert "migrate recover" in caught.value.hint
        # The next start, or `recover`, tries again.
        assert rig.state(Side.TARGET) is State.RUNNING
        monkeypatch.setattr(reclaim, "run_target", lambda _: rig.log.append("tried again"))
        assert await migration.settle(State.FINISHED, source_is_dead=False) is State.FINISHED
        assert "tried again" in rig.log

    tell(story)


def test_a_target_that_fails_as_nobody_foresaw_tells_the_source_and_is_discarded(tell, monkeypatch: pytest.MonkeyPatch):
    async def story(rig: SideRig) -> None:
        def fail(*_: Any) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(reclaim, "facts_of_restored", fail)
        migration = rig.target()
        await migration.prepare("")
        rig.restored()
        await until(lambda: rig.sent(link.LinkFailed))
        with contextlib.suppress(MigrateError):
            await migration.finish()
        assert rig.state(Side.TARGET) is State.DISCARDED
        assert rig.runtime.there == set()

    tell(story)


def test_a_word_that_decides_nothing_leaves_a_waiting_target_to_its_source(tell, monkeypatch: pytest.MonkeyPatch):
    async def story(rig: SideRig) -> None:
        monkeypatch.setattr(target, "_LISTEN_AFTER_RUNNING_S", 0.0)
        migration = await waiting(rig)
        with pytest.raises(InDoubtError, match="nothing to settle yet"):
            await migration.settle(State.CUT_OVER, source_is_dead=False)
        rig.live.link.put(link.LinkCommit(migration=ID, epoch=1))
        await until(lambda: rig.sent(link.LinkRunning))
        await migration.finish()
        assert rig.state(Side.TARGET) is State.FINISHED

    tell(story)


def test_a_target_that_is_settled_while_it_cleans_up_is_cleaned_up_once(tell, monkeypatch: pytest.MonkeyPatch):
    async def story(rig: SideRig) -> None:
        monkeypatch.setattr(target, "_LISTEN_AFTER_RUNNING_S", 0.05)
        migration = await waiting(rig)
        rig.live.link.put(link.LinkCommit(migration=ID, epoch=1))
        await until(lambda: migration._ending is not None)
        assert await migration.settle(State.COMMITTED, source_is_dead=False) is State.FINISHED
        assert rig.log.count("sockets activated") == 1

    tell(story)


def test_a_migration_whose_undo_is_pending_holds_its_container(tell):
    async def story(rig: SideRig) -> None:
        begin: dict[str, Any] = {"side": Side.TARGET, "epoch": 1, "container": "web1", "peer": "", "coordinator": ""}
        rig.journal.begin(migration=ID, **begin)
        rig.journal.undo_ahead(ID, Side.TARGET, Undo("thaw", {"paths": ["/a"]}))
        rig.journal.move(ID, Side.TARGET, Event.ABORT)
        with pytest.raises(MigrateError, match="not all undone"):
            rig.journal.begin(migration="side-test-2", **begin)
        run_pending(rig.host.state_dir, ID, Side.TARGET)
        rig.journal.begin(migration="side-test-2", **begin)

    tell(story)


def test_what_a_living_process_drives_is_adopted_by_nobody(tell):
    async def story(rig: SideRig) -> None:
        rig.journal.begin(migration=ID, side=Side.SOURCE, epoch=1, container="web1", peer="", coordinator="")
        assert rig.journal.adopt(ID, Side.SOURCE)
        with sqlite3.connect(rig.host.state_dir / "journal.sqlite") as db:
            db.execute("UPDATE migrations SET driver_pid=1, driver_start=?", (start_time(1),))
        db.close()
        assert not rig.journal.adopt(ID, Side.SOURCE)

    tell(story)


def test_a_discarded_target_has_the_config_that_it_had(tell):
    async def story(rig: SideRig) -> None:
        own = '{"process": {"args": ["another"]}}'
        (rig.bundle / "config.json").write_text(own)
        migration = rig.target()
        await migration.prepare("")
        assert (rig.bundle / "config.json").read_text() == rig.config
        await migration.abort("enough")
        assert (rig.bundle / "config.json").read_text() == own

    tell(story)


def test_a_bundle_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(MigrateError, match=r"cannot write .*/nowhere/config.json: No such file") as caught:
        write_config(str(tmp_path / "nowhere"), "{}")
    assert "is the bundle" in caught.value.hint
    assert read_config(str(tmp_path / "nowhere")) is None


def test_a_record_that_is_not_understood_keeps_no_agent_from_starting(tell, monkeypatch: pytest.MonkeyPatch):
    async def story(rig: SideRig) -> None:
        begin: dict[str, Any] = {"side": Side.SOURCE, "epoch": 1, "peer": "", "coordinator": ""}
        rig.journal.begin(migration=ID, container="web1", facts={"freezer": ["/a"], "of": "another version"}, **begin)
        rig.journal.move(ID, Side.SOURCE, Event.ARMED, Event.FREEZE, Event.RESTORED, Event.COMMIT, Event.RUNNING)
        rig.journal.begin(migration="side-test-2", container="web2", **begin)

        def stumble(facts: dict[str, Any]) -> None:
            raise KeyError("cuts")

        monkeypatch.setattr(reclaim, "forget_source_network", stumble)
        said = await reclaim.settle_at_start(rig.host)
        assert f"{ID}: source running of web1: its record is not understood (KeyError: 'cuts')" in said
        entry = rig.journal.find("side-test-2", Side.SOURCE)
        assert entry is not None
        assert entry.state is State.ABORTED

    tell(story)


def test_a_target_that_cannot_tell_of_its_running_is_cleaned_up_all_the_same(tell, monkeypatch: pytest.MonkeyPatch):
    async def story(rig: SideRig) -> None:
        monkeypatch.setattr(target, "_LISTEN_AFTER_RUNNING_S", 0.0)
        migration = await waiting(rig)

        def gone(_: Any, message: Any) -> None:
            raise MigrateError(f"no stream for {message}", code="process-gone")

        monkeypatch.setattr(Workers, "send_link", gone)
        rig.live.link.put(link.LinkCommit(migration=ID, epoch=1))
        await until(lambda: "thawed" in rig.log)
        with pytest.raises(MigrateError, match="owned here"):
            await migration.abort("enough")
        await migration.finish()
        assert rig.state(Side.TARGET) is State.FINISHED
        assert rig.all_closed()

    tell(story)


def test_a_full_disk_keeps_no_half_made_target(tell, monkeypatch: pytest.MonkeyPatch):
    async def story(rig: SideRig) -> None:
        migration = rig.target()
        await migration.prepare("")
        assert rig.runtime.there == {"web1"}

        def full(*_: Any, **__: Any) -> State:
            raise MigrateError("the journal cannot be written: disk is full", code="journal")

        monkeypatch.setattr(Journal, "move", full)
        with pytest.raises(MigrateError, match="disk is full") as caught:
            await migration.abort("enough")
        assert caught.value.code == "left-behind"
        assert rig.runtime.there == set()
        assert rig.all_closed()

    tell(story)
