"""The journal: one record a move, locks, undo in order, whole after any crash."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.journal import Journal, Undo
from protocol.errors import BusyError, LocalProtocolError, MigrateError, UsageError
from protocol.states import Event, Side, State
from tests.lab.host import PROJECT

ID = "20260101-aaaa"
OTHER = "20260101-bbbb"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path)
    yield opened
    opened.close()


def begin(journal: Journal, migration: str = ID, container: str = "web1", side: Side = Side.SOURCE) -> None:
    journal.begin(migration=migration, side=side, epoch=1, container=container, peer="hostB", coordinator="ann@desk")


def state(journal: Journal, side: Side = Side.SOURCE) -> State:
    entry = journal.find(ID, side)
    assert entry is not None
    return entry.state


def test_a_new_entry_is_preparing_and_driven_by_this_process(journal: Journal):
    journal.begin(
        migration=ID, side=Side.SOURCE, epoch=3, container="web1", peer="hostB", coordinator="ann", facts={"a": [1]}
    )
    entry = journal.find(ID, Side.SOURCE)
    assert entry is not None
    assert (entry.state, entry.epoch, entry.facts, entry.peer) == (State.PREPARING, 3, {"a": [1]}, "hostB")
    assert entry.driver_pid == os.getpid()
    assert entry.is_driven
    assert not entry.is_final
    assert entry.status().state == "preparing"


def test_a_held_container_is_refused_with_who_and_since_when(journal: Journal):
    begin(journal)
    with pytest.raises(BusyError) as caught:
        begin(journal, OTHER)
    text = str(caught.value)
    assert re.search(rf"web1 is held by migration {ID} \(preparing, started by ann@desk at \d{{4}}-\d\d-\d\d ", text)
    assert f"migrate abort {ID}" in text
    assert caught.value.exit_status == 3
    assert journal.find(OTHER, Side.SOURCE) is None


def test_a_finished_migration_holds_nothing(journal: Journal):
    begin(journal)
    held = journal.holder("web1")
    assert held is not None
    assert held.migration == ID
    journal.move(ID, Side.SOURCE, Event.ABORT)
    assert journal.holder("web1") is None
    begin(journal, OTHER)


def test_another_container_is_not_held(journal: Journal):
    begin(journal)
    begin(journal, OTHER, container="web2")
    assert {entry.container for entry in journal.entries(unfinished_only=True)} == {"web1", "web2"}


def test_an_id_is_used_once(journal: Journal):
    begin(journal)
    journal.move(ID, Side.SOURCE, Event.ABORT)
    with pytest.raises(UsageError, match="in the journal already"):
        begin(journal)


def test_an_illegal_move_changes_nothing(journal: Journal):
    begin(journal)
    with pytest.raises(LocalProtocolError, match="commit in state preparing"):
        journal.move(ID, Side.SOURCE, Event.COMMIT, facts={"x": 1}, undo=[Undo("thaw", {})])
    entry = journal.find(ID, Side.SOURCE)
    assert entry is not None
    assert (entry.state, entry.facts) == (State.PREPARING, {})
    assert journal.pending_undo(ID, Side.SOURCE) == []


def test_of_several_events_all_are_taken_or_none(journal: Journal):
    begin(journal)
    with pytest.raises(LocalProtocolError):
        journal.move(ID, Side.SOURCE, Event.ARMED, Event.FREEZE, Event.COMMIT)
    assert state(journal) is State.PREPARING
    assert journal.move(ID, Side.SOURCE, Event.ARMED, Event.FREEZE, Event.RESTORED, Event.COMMIT) is State.COMMITTED
    assert state(journal) is State.COMMITTED


def test_a_move_of_an_unknown_migration_is_refused(journal: Journal):
    begin(journal)
    with pytest.raises(UsageError, match=f"no migration {ID} on this host as target"):
        journal.move(ID, Side.TARGET, Event.ARMED)
    with pytest.raises(UsageError):
        journal.adopt(OTHER, Side.SOURCE)


def test_facts_are_added_and_the_last_detail_stays(journal: Journal):
    begin(journal)
    journal.move(ID, Side.SOURCE, Event.ARMED, facts={"a": 1, "b": 1}, detail="so")
    journal.move(ID, Side.SOURCE, Event.FREEZE, facts={"b": 2}, epoch=7)
    entry = journal.find(ID, Side.SOURCE)
    assert entry is not None
    assert (entry.facts, entry.detail, entry.epoch) == ({"a": 1, "b": 2}, "so", 7)


def test_undo_comes_newest_first_over_all_ways_it_was_written(journal: Journal):
    begin(journal)
    journal.undo_ahead(ID, Side.SOURCE, Undo("one", {"n": 1}), Undo("two", {}))
    journal.move(ID, Side.SOURCE, Event.ARMED, undo=[Undo("three", {}), Undo("four", {})])
    pending = journal.pending_undo(ID, Side.SOURCE)
    assert [item.kind for item in pending] == ["four", "three", "two", "one"]
    assert pending[-1].arguments == {"n": 1}
    journal.forget_undo(pending[0].number, pending[2].number)
    assert [item.kind for item in journal.pending_undo(ID, Side.SOURCE)] == ["three", "one"]


def test_clear_undo_drops_what_was_and_keeps_what_comes_with_it(journal: Journal):
    begin(journal)
    begin(journal, OTHER, container="web2")
    journal.undo_ahead(ID, Side.SOURCE, Undo("old", {}))
    journal.undo_ahead(OTHER, Side.SOURCE, Undo("of another", {}))
    journal.move(ID, Side.SOURCE, Event.ARMED, clear_undo=True, undo=[Undo("new", {})])
    assert [item.kind for item in journal.pending_undo(ID, Side.SOURCE)] == ["new"]
    assert [item.kind for item in journal.pending_undo(OTHER, Side.SOURCE)] == ["of another"]


def test_a_final_entry_with_effects_left_is_unsettled(journal: Journal):
    begin(journal)
    journal.undo_ahead(ID, Side.SOURCE, Undo("thaw", {}))
    journal.move(ID, Side.SOURCE, Event.ABORT)
    assert [entry.migration for entry in journal.unsettled()] == [ID]
    journal.forget_undo(*(item.number for item in journal.pending_undo(ID, Side.SOURCE)))
    assert journal.unsettled() == []


def test_source_and_target_of_one_migration_are_two_rows(journal: Journal):
    begin(journal, container="web1")
    begin(journal, container="web1-copy", side=Side.TARGET)
    journal.move(ID, Side.TARGET, Event.ABORT)
    assert (state(journal), state(journal, Side.TARGET)) == (State.PREPARING, State.DISCARDED)
    assert len(journal.entries(ID)) == 2
    assert journal.entries(OTHER) == []


def test_what_an_agent_did_is_driven_by_nobody_once_it_is_dead(tmp_path: Path, journal: Journal):
    program = (
        "import pathlib, sys; from agent.journal import Journal; from protocol.states import Side;"
        f"Journal(pathlib.Path(sys.argv[1])).begin(migration={ID!r}, side=Side.SOURCE, epoch=1, container='web1',"
        " peer='', coordinator=''); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as agent:
        assert agent.stdout is not None
        agent.stdout.readline()
        entry = journal.find(ID, Side.SOURCE)
        assert entry is not None
        assert (entry.driver_pid, entry.is_driven) == (agent.pid, True)
        with pytest.raises(BusyError):
            begin(journal, OTHER)
        agent.kill()
        # Dead, and not reaped yet, counts as dead.
        os.waitid(os.P_PID, agent.pid, os.WEXITED | os.WNOWAIT)
        assert not entry.is_driven
    assert not entry.is_driven
    journal.adopt(ID, Side.SOURCE)
    adopted = journal.find(ID, Side.SOURCE)
    assert adopted is not None
    assert adopted.is_driven


# The child says each call before and after it was made; the test kills it at any of these words.
_STEPS = """
import os, pathlib, sys
from agent.journal import Journal, Undo
from protocol.states import Event, Side
ID, S = "20260101-aaaa", Side.SOURCE
journal = Journal(pathlib.Path(sys.argv[1]))
def step(name, call):
    print(name, flush=True)
    sys.stdin.readline()
    call()
step("begin", lambda: journal.begin(
    migration=ID, side=S, epoch=1, container="web1", peer="b", coordinator="c"))
step("undo", lambda: journal.undo_ahead(ID, S, Undo("one", {}), Undo("two", {})))
step("armed", lambda: journal.move(ID, S, Event.ARMED, facts={"armed": True}))
step("freeze", lambda: journal.move(ID, S, Event.FREEZE, undo=[Undo("three", {})]))
step("commit", lambda: journal.move(ID, S, Event.RESTORED, Event.COMMIT, clear_undo=True))
step("running", lambda: journal.move(ID, S, Event.RUNNING))
step("cleaned", lambda: journal.move(ID, S, Event.CLEANED))
step("end", lambda: None)
"""
# What stands in the journal when the child said the word: everything before it, and nothing of it.
_SEEN = {
    "begin": None,
    "undo": (State.PREPARING, []),
    "armed": (State.PREPARING, ["two", "one"]),
    "freeze": (State.PRECOPY, ["two", "one"]),
    "commit": (State.CUT_OVER, ["three", "two", "one"]),
    "running": (State.COMMITTED, []),
    "cleaned": (State.RUNNING, []),
    "end": (State.FINISHED, []),
}


@pytest.mark.parametrize("word", _SEEN)
def test_a_killed_agent_leaves_each_call_done_or_not_begun(tmp_path: Path, word: str):
    with subprocess.Popen(
        [sys.executable, "-c", _STEPS, tmp_path], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as agent:
        assert agent.stdin is not None
        assert agent.stdout is not None
        while agent.stdout.readline() != f"{word}\n".encode():
            agent.stdin.write(b"\n")
            agent.stdin.flush()
        agent.send_signal(signal.SIGKILL)
    journal = Journal(tmp_path)
    entry = journal.find(ID, Side.SOURCE)
    found = None if entry is None else (entry.state, [item.kind for item in journal.pending_undo(ID, Side.SOURCE)])
    journal.close()
    assert found == _SEEN[word]


def test_an_agent_killed_inside_a_call_leaves_it_whole(tmp_path: Path):
    """A writer that never stops is killed at moments of chance; each row has its undo, or there is no such row."""
    program = """
import itertools, pathlib, sys
from agent.journal import Journal, Undo
from protocol.states import Event, Side
journal = Journal(pathlib.Path(sys.argv[1]))
print(flush=True)
for n in itertools.count():
    journal.begin(migration=f"m-{n:06}", side=Side.SOURCE, epoch=1, container=f"c{n}", peer="", coordinator="")
    journal.move(f"m-{n:06}", Side.SOURCE, Event.ARMED, facts={"n": n}, undo=[Undo("u", {"n": n})])
"""
    for delay_s in (0.0, 0.004, 0.011, 0.023):
        directory = tmp_path / str(delay_s)
        with subprocess.Popen([sys.executable, "-c", program, directory], cwd=PROJECT, stdout=subprocess.PIPE) as agent:
            assert agent.stdout is not None
            agent.stdout.readline()
            timer = threading.Timer(delay_s, agent.kill)
            timer.start()
            agent.wait(20)
        journal = Journal(directory)
        for entry in journal.entries():
            undo = [item.arguments for item in journal.pending_undo(entry.migration, entry.side)]
            assert (entry.state, entry.facts, undo) in [
                (State.PREPARING, {}, []),
                (State.PRECOPY, entry.facts, [entry.facts]),
            ]
        journal.close()


def test_two_processes_share_it_and_one_gets_the_lock(tmp_path: Path):
    program = """
import itertools, pathlib, sys
from agent.journal import Journal
from protocol.errors import BusyError
from protocol.states import Event, Side
sys.stdin.readline()
journal = Journal(pathlib.Path(sys.argv[1]))
won = 0
for n in itertools.count():
    if won == 20:  # nobody promises turns: each goes on until it had its share
        break
    name = f"m-{sys.argv[2]}-{n}"
    try:
        journal.begin(migration=name, side=Side.SOURCE, epoch=1, container="web1", peer="", coordinator="")
    except BusyError:
        continue
    assert [e.migration for e in journal.entries(unfinished_only=True)] == [name]
    journal.move(name, Side.SOURCE, Event.ABORT)
    won += 1
"""
    agents = [
        subprocess.Popen(
            [sys.executable, "-c", program, tmp_path, str(n)], cwd=PROJECT, stdin=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for n in range(2)
    ]  # fmt: skip
    # A fresh file is made by both at once.
    for agent in agents:
        assert agent.stdin is not None
        agent.stdin.write("\n")
        agent.stdin.flush()
    said = [agent.communicate(timeout=60)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said


def test_a_new_journal_may_be_opened_by_several_agents_at_once(tmp_path: Path):
    program = "import pathlib, sys; from agent.journal import Journal; print(flush=True); sys.stdin.readline();"
    program += "Journal(pathlib.Path(sys.argv[1]))"
    agents = [
        subprocess.Popen(
            [sys.executable, "-c", program, tmp_path], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    for agent in agents:
        assert agent.stdout is not None
        agent.stdout.readline()
    for agent in agents:
        assert agent.stdin is not None
        agent.stdin.write("\n")
        agent.stdin.flush()
    said = [agent.communicate(timeout=30)[1] for agent in agents]
    assert said == [""] * 4


def test_one_that_sees_the_others_move_may_not_make_it_again(tmp_path: Path, journal: Journal):
    begin(journal)
    second = Journal(tmp_path)
    assert second.move(ID, Side.SOURCE, Event.ARMED) is State.PRECOPY
    assert state(journal) is State.PRECOPY
    with pytest.raises(LocalProtocolError):
        journal.move(ID, Side.SOURCE, Event.ARMED)
    second.close()


def test_every_move_is_synced_to_the_disk(journal: Journal):
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_only_root_may_look_into_a_new_state_directory(tmp_path: Path):
    Journal(tmp_path / "new").close()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MigrateError, match=r"cannot open the journal in .*file/state") as caught:
        Journal(tmp_path / "file" / "state")
    assert caught.value.code == "journal"
    assert "state_dir" in caught.value.hint


def test_a_damaged_file_is_an_error_of_the_journal(tmp_path: Path):
    (tmp_path / "journal.sqlite").write_bytes(b"no database, " * 1000)
    with pytest.raises(MigrateError) as caught:
        Journal(tmp_path)
    assert caught.value.code == "journal"


def test_a_state_of_a_later_version_is_an_error_of_the_journal(tmp_path: Path, journal: Journal):
    begin(journal)
    with sqlite3.connect(tmp_path / "journal.sqlite") as db:
        db.execute("UPDATE migrations SET state = 'dreaming'")
    db.close()
    for call in (journal.entries, lambda: journal.move(ID, Side.SOURCE, Event.ARMED)):
        with pytest.raises(MigrateError, match="dreaming") as caught:
            call()
        assert caught.value.code == "journal"
