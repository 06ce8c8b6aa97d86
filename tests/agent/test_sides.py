"""Source and target when things come at the wrong moment: nothing leaks, nothing stays frozen, nothing runs twice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agent import source
from agent.engine import base
from agent.journal import Journal, Undo
from agent.service import Service, Session
from agent.undo import run_pending
from protocol import link_messages as link
from protocol import messages as m
from protocol.connection import Connection, Role
from protocol.errors import (
    AbortedError,
    InDoubtError,
    MigrateError,
    NotConvergedError,
    UsageError,
    error_from_wire,
)
from protocol.states import Event, Side, State
from tests.agent.side_rig import ID, SideRig
from tests.agent.side_stories import CUT_OVER, precopy, until

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
