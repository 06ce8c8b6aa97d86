"""Both sides from the commit on, and what is settled afterwards."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from agent import reclaim, target
from agent.journal import Journal, Undo
from agent.journal import _start_time as start_time
from agent.undo import read_config, run_pending, write_config
from agent.worker import Workers
from protocol import link_messages as link
from protocol.errors import (
    InDoubtError,
    KernelError,
    MigrateError,
)
from protocol.states import Event, Side, State
from tests.agent.side_rig import ID, Network, SideRig
from tests.agent.side_stories import committed, precopy, until, waiting


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
