"""The journal: which migrations this host takes part in, their state, and the undo of every effect, on disk.

SQLite in WAL mode with synchronous=FULL: each `move` is one fsync, and the record that decides who owns a container
is such a move. One row is one side of one migration; several agent processes (a daemon, and `--stdio` ones) may
share the file, so a row names the process that drives it.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import BusyError, MigrateError, UsageError
from protocol.messages import MigrationStatus
from protocol.states import FINAL, Event, Side, State, next_state

_SCHEMA = """
CREATE TABLE IF NOT EXISTS migrations (
    migration TEXT NOT NULL, side TEXT NOT NULL, epoch INTEGER NOT NULL, state TEXT NOT NULL,
    container TEXT NOT NULL, peer TEXT NOT NULL, coordinator TEXT NOT NULL,
    started REAL NOT NULL, since REAL NOT NULL, driver_pid INTEGER NOT NULL, driver_start INTEGER NOT NULL,
    detail TEXT NOT NULL DEFAULT '', facts TEXT NOT NULL DEFAULT '{}',
    PRIMARY KEY (migration, side));
CREATE TABLE IF NOT EXISTS undo (
    number INTEGER PRIMARY KEY, migration TEXT NOT NULL, side TEXT NOT NULL, kind TEXT NOT NULL,
    arguments TEXT NOT NULL);
"""
# A writer holds the lock for one fsync; a slow disk may take long for it, but not this long.
_LOCK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One side of one migration, as the journal has it."""

    migration: str
    side: Side
    epoch: int
    state: State
    container: str
    peer: str
    coordinator: str
    started: float
    since: float
    driver_pid: int
    driver_start: int
    detail: str
    facts: dict[str, Any]

    @property
    def is_final(self) -> bool:
        """Nothing is left to do."""
        return self.state in FINAL

    @property
    def is_driven(self) -> bool:
        """The process that drives it is alive."""
        return _start_time(self.driver_pid) == self.driver_start

    def busy(self) -> BusyError:
        """Why its container cannot be moved by another migration: by whom it is held, and since when."""
        since = time.strftime("%F %T", time.localtime(self.started))
        return BusyError(
            f"{self.container} is held by migration {self.migration} ({self.state.value}, "
            f"started by {self.coordinator or 'unknown'} at {since})",
            hint=f"wait for it, or: migrate abort {self.migration}",
        )

    def status(self, *, copy_alive: bool = True) -> MigrationStatus:
        """For a coordinator. `copy_alive`: whether this side's tasks are there."""
        return MigrationStatus(
            migration=self.migration, epoch=self.epoch, side=self.side.value, state=self.state.value,
            container=self.container, peer=self.peer, since=self.since, started=self.started,
            coordinator=self.coordinator, detail=self.detail, copy_alive=copy_alive,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Undo:
    """How to take back one effect: a kind that agent.undo knows, and plain arguments."""

    kind: str
    arguments: dict[str, Any]
    number: int = 0


def _start_time(pid: int) -> int:
    """Start time of a process in clock ticks, 0 when it has ended. Source: proc_pid_stat(5), fields 3 and 22."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = stat[stat.rindex(")") + 2 :].split()
    # A dead agent may wait for a parent that is slow to reap it.
    return 0 if fields[0] in {"Z", "X"} else int(fields[19])


class Journal:
    """All migrations of a state directory.

    Raises (any method): MigrateError code 'journal': the disk is full or the file is damaged.
    """

    def __init__(self, state_dir: Path) -> None:
        try:
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            # The change to WAL does not wait for a lock as all else does: two that open a new file would collide.
            with (state_dir / "journal.lock").open("w", encoding="ascii") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._db = sqlite3.connect(state_dir / "journal.sqlite", timeout=_LOCK_TIMEOUT_S, isolation_level=None)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise MigrateError(
                f"cannot open the journal in {state_dir}: {error}", code="journal", hint="see state_dir in agent.toml"
            ) from error
        self._driver = (os.getpid(), _start_time(os.getpid()))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            yield self._db
        except (sqlite3.Error, ValueError) as error:  # ValueError: a state or JSON that this version does not know
            raise MigrateError(f"the journal cannot be read: {error}", code="journal") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except (sqlite3.Error, ValueError) as error:  # ValueError: see _reading
            raise MigrateError(f"the journal cannot be written: {error}", code="journal") from error

    def begin(
        self, *, migration: str, side: Side, epoch: int, container: str, peer: str, coordinator: str,
        facts: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Lock `container` for this migration, in state PREPARING.

        Raises: BusyError: another unfinished migration holds it, who and since when. UsageError: the id is known.
        """
        now = time.time()
        with self._transaction() as db:
            for entry in self._select(db, "container = ?", (container,)):
                if entry.is_final and self._has_undo(db, entry):
                    raise BusyError(
                        f"migration {entry.migration} of {container} has ended ({entry.state.value}), and what it did "
                        "here is not all undone",
                        hint="try again in a moment; if that does not help: restart migrate-agent and see its log",
                    )
                if not entry.is_final:
                    raise entry.busy()
            if self._select(db, "migration = ? AND side = ?", (migration, side.value)):
                raise UsageError(f"migration {migration} is in the journal already")
            db.execute(
                "INSERT INTO migrations VALUES (?,?,?,?,?,?,?,?,?,?,?,'',?)",
                (migration, side.value, epoch, State.PREPARING.value, container, peer, coordinator, now, now,
                 *self._driver, json.dumps(facts or {})),
            )  # fmt: skip

    @staticmethod
    def _has_undo(db: sqlite3.Connection, entry: Entry) -> bool:
        where = (entry.migration, entry.side.value)
        return db.execute("SELECT 1 FROM undo WHERE migration=? AND side=? LIMIT 1", where).fetchone() is not None

    def move(
        self, migration: str, side: Side, *events: Event, detail: str = "", facts: dict[str, Any] | None = None,
        undo: Sequence[Undo] = (), clear_undo: bool = False, epoch: int | None = None,
    ) -> State:  # fmt: skip
        """Apply `events` in order, durably and at once, with new facts and the undo of what comes next.

        `clear_undo`: the effects so far are here to stay; nobody may take them back from now on.
        `epoch`: a new one, greater than before; None: as it is.

        Raises: LocalProtocolError: the table of protocol.states does not allow it.
        """
        with self._transaction() as db:
            entry = self._one(db, migration, side)
            state = entry.state
            for event in events:
                state = next_state(side, state, event)
            db.execute(
                "UPDATE migrations SET state=?, since=?, detail=?, facts=?, epoch=? WHERE migration=? AND side=?",
                (state.value, time.time(), detail or entry.detail, json.dumps(entry.facts | (facts or {})),
                 entry.epoch if epoch is None else epoch, migration, side.value),
            )  # fmt: skip
            if clear_undo:
                db.execute("DELETE FROM undo WHERE migration=? AND side=?", (migration, side.value))
            self._add_undo(db, migration, side, undo)
        return state

    def adopt(self, migration: str, side: Side) -> bool:
        """This process drives it from now on. False: another one does, and lives."""
        with self._transaction() as db:
            entry = self._one(db, migration, side)
            if entry.is_driven and entry.driver_pid != self._driver[0]:
                return False
            db.execute(
                "UPDATE migrations SET driver_pid=?, driver_start=? WHERE migration=? AND side=?",
                (*self._driver, migration, side.value),
            )
        return True

    def undo_ahead(self, migration: str, side: Side, *undo: Undo) -> None:
        """Write down, durably, how to take back what is done next."""
        with self._transaction() as db:
            self._add_undo(db, migration, side, undo)

    @staticmethod
    def _add_undo(db: sqlite3.Connection, migration: str, side: Side, undo: Sequence[Undo]) -> None:
        db.executemany(
            "INSERT INTO undo (migration, side, kind, arguments) VALUES (?,?,?,?)",
            [(migration, side.value, item.kind, json.dumps(item.arguments)) for item in undo],
        )

    def pending_undo(self, migration: str, side: Side) -> list[Undo]:
        """What has to be taken back, newest first."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT number, kind, arguments FROM undo WHERE migration=? AND side=? ORDER BY number DESC",
                (migration, side.value),
            )
            return [Undo(kind, json.loads(arguments), number) for number, kind, arguments in rows]

    def forget_undo(self, *numbers: int) -> None:
        """These are taken back, or no longer to be taken back."""
        with self._transaction() as db:
            db.executemany("DELETE FROM undo WHERE number=?", [(number,) for number in numbers])

    def find(self, migration: str, side: Side) -> Entry | None:
        """One side of one migration."""
        rows = self._read("migration = ? AND side = ?", (migration, side.value))
        return rows[0] if rows else None

    def entries(self, migration: str = "", *, unfinished_only: bool = False) -> list[Entry]:
        """All, newest first, or those of one migration (both sides may be here in a test)."""
        rows = self._read("? IN ('', migration)", (migration,))
        return [entry for entry in rows if not (unfinished_only and entry.is_final)]

    def unsettled(self) -> list[Entry]:
        """Those that are not final, and final ones with effects not taken back yet."""
        rows = self._read("1", ())
        return [entry for entry in rows if not entry.is_final or self.pending_undo(entry.migration, entry.side)]

    def holder(self, container: str) -> Entry | None:
        """The unfinished migration that locks a container."""
        rows = self._read("container = ?", (container,))
        return next((entry for entry in rows if not entry.is_final), None)

    def _read(self, where: str, arguments: tuple[object, ...]) -> list[Entry]:
        with self._reading() as db:
            return self._select(db, where, arguments)

    def _one(self, db: sqlite3.Connection, migration: str, side: Side) -> Entry:
        rows = self._select(db, "migration = ? AND side = ?", (migration, side.value))
        if not rows:
            raise UsageError(f"no migration {migration} on this host as {side.value}")
        return rows[0]

    @staticmethod
    def _select(db: sqlite3.Connection, where: str, arguments: tuple[object, ...]) -> list[Entry]:
        rows = db.execute(
            "SELECT migration, side, epoch, state, container, peer, coordinator, started, since, driver_pid,"  # noqa: S608  (`where` is ours)
            f" driver_start, detail, facts FROM migrations WHERE {where} ORDER BY started DESC",
            arguments,
        )
        return [
            Entry(
                migration=row[0], side=Side(row[1]), epoch=row[2], state=State(row[3]), container=row[4], peer=row[5],
                coordinator=row[6], started=row[7], since=row[8], driver_pid=row[9], driver_start=row[10],
                detail=row[11], facts=json.loads(row[12]),
            )
            for row in rows
        ]  # fmt: skip
