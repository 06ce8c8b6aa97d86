"""The agent's face to coordinators: sessions over SSH or stdio, requests in, answers out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from agent import containers, hostreport, reclaim
from agent.host import Host
from agent.source import SourceMigration, failure_of
from agent.target import TargetMigration
from protocol import messages as m
from protocol.connection import NEED_DATA, Connection, ConnectionClosed, Role
from protocol.errors import BusyError, LocalProtocolError, MigrateError, PeerError, ProtocolError, UsageError
from protocol.negotiation import choose_version
from protocol.states import Side, State, may_abort

_log = logging.getLogger(__name__)

T = TypeVar("T")

SUBSYSTEM = "migrate-agent"
SOFTWARE = "migrate-agent 0.1"
ROLES = ("operate", "observe")
# People watch progress; a machine asks for the result.
_PROGRESS_INTERVAL_S = 0.2
# systemd gives a service 90 s by default; undoing takes one or two.
_SHUT_DOWN_S = 15.0
_OBSERVER_MAY: tuple[type[m.Message], ...] = (
    m.Hello, m.GetHostReport, m.ListContainers, m.InspectContainer, m.ReadClock, m.GetStatus,
)  # fmt: skip

Migration = SourceMigration | TargetMigration


class Service:
    """All that coordinators may ask of one host. Sessions come and go; migrations stay."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.migrations: dict[tuple[str, Side], Migration] = {}

    def source(self, migration: str) -> SourceMigration:
        """The outgoing migration of that id. Raises: UsageError."""
        found = self.migrations.get((migration, Side.SOURCE))
        if not isinstance(found, SourceMigration):
            raise UsageError(f"no migration {migration} leaves this host", host=self.host.name)
        return found

    def sides(self, migration: str) -> list[Migration]:
        """What this process drives of a migration. Raises: UsageError: nothing."""
        found = [item for (name, _), item in self.migrations.items() if name == migration]
        if not found:
            for entry in self.host.journal.entries(migration, unfinished_only=True) if migration else ():
                if entry.is_driven:
                    raise BusyError(
                        f"migration {migration} belongs to another agent process ({entry.driver_pid})",
                        host=self.host.name, hint=f"end it where it was started: {entry.coordinator}",
                    )  # fmt: skip
            raise UsageError(f"no migration {migration} on this host", host=self.host.name)
        return found

    def has(self, migration: str) -> bool:
        """Whether this process drives a side of it."""
        return any(name == migration for name, _ in self.migrations)

    def add(self, migration: Migration) -> None:
        """Keep it; ended ones make room. Raises: UsageError: there is one of this id."""
        if (migration.id, migration.side) in self.migrations:
            raise UsageError(f"migration {migration.id} is under way already", host=self.host.name)
        self.migrations = {
            key: item for key, item in self.migrations.items()
            # One without an entry is about to begin.
            if (entry := self.host.journal.find(item.id, item.side)) is None or not entry.is_final
        }  # fmt: skip
        self.migrations[migration.id, migration.side] = migration

    async def shut_down(self) -> None:
        """The agent ends: what is before its commit point is undone in order; the rest by itself or at the start."""
        for migration in list(self.migrations.values()):
            entry = self.host.journal.find(migration.id, migration.side)
            if entry is not None and may_abort(migration.side, entry.state):
                try:
                    await asyncio.wait_for(migration.abort("the agent was stopped"), _SHUT_DOWN_S)
                except (MigrateError, TimeoutError) as error:
                    _log.warning("%s: %s", migration.id, error or "not undone in time; the next start does it")

    def remove(self, migration: Migration) -> None:
        """It never came to be."""
        self.migrations.pop((migration.id, migration.side), None)


class Session:
    """One coordinator's connection. `write` takes bytes for the wire; `close` ends it."""

    def __init__(
        self, service: Service, *, write: Callable[[bytes], None], role: str, peer: str, peer_address: str
    ) -> None:
        self._service = service
        self._host = service.host
        self._write = write
        self._role = role
        self._peer = peer
        self._peer_address = peer_address
        self._connection = Connection(Role.AGENT)
        self._tasks: set[asyncio.Task[None]] = set()
        self._coordinator = peer
        self._mine: list[Migration] = []
        self._end_reason = "the connection to the coordinator was lost"

    async def run(self, read: Callable[[], Awaitable[bytes]]) -> None:
        """Serve until the coordinator goes or breaks the protocol."""
        try:
            while True:
                data = await self._read_or_ping(read)
                self._connection.receive_data(data)
                if not self._take_events():
                    return
        except ProtocolError as error:
            _log.warning("%s: %s", self._peer, error)
        except asyncio.CancelledError:
            self._end_reason = "the agent was stopped"
            raise
        finally:
            await asyncio.shield(self._orphan())

    async def _read_or_ping(self, read: Callable[[], Awaitable[bytes]]) -> bytes:
        reading = asyncio.ensure_future(read())
        try:
            while True:
                deadline = self._connection.next_deadline(time.monotonic())
                timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
                done, _ = await asyncio.wait({reading}, timeout=timeout_s)
                if done:
                    return reading.result()
                self._write(self._connection.handle_timeout(time.monotonic()))
        finally:
            reading.cancel()

    def _take_events(self) -> bool:
        while True:
            event = self._connection.next_event()
            if out := self._connection.data_to_send():
                self._write(out)
            if event is NEED_DATA:
                return True
            match event:
                case ConnectionClosed():
                    return False
                case m.Request():
                    task = asyncio.create_task(self._answer(event))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: m.Request) -> None:
        try:
            if self._role == "observe" and not isinstance(request.body, _OBSERVER_MAY):
                raise PeerError(
                    f'this key may only look (migrate-role="observe"), not {type(request.body).__name__}', code="role"
                )
            body = await self._dispatch(request.body)
        except MigrateError as error:
            body = failure_of(error, self._host.name)
        except Exception as error:  # noqa: BLE001  (told to the coordinator, and to the log with its traceback)
            _log.exception("%s failed", type(request.body).__name__)
            body = m.Failure(
                family="internal", code="internal", host=self._host.name,
                message=f"{type(request.body).__name__}: {type(error).__name__}: {error}",
            )  # fmt: skip
        try:
            self._send(m.Reply(number=request.number, body=body))
        except LocalProtocolError as error:
            _log.exception("the answer to %s does not fit its schema", type(request.body).__name__)
            failure = m.Failure(family="internal", code="internal", host=self._host.name, message=str(error)[:4000])
            self._send(m.Reply(number=request.number, body=failure))

    def _send(self, message: m.Reply | m.Notice) -> None:
        """Raises: LocalProtocolError: the message does not fit its own schema, a bug of ours."""
        if self._connection.usable:
            with contextlib.suppress(ConnectionError):  # the coordinator may have gone meanwhile
                self._write(self._connection.send(message))

    async def _orphan(self) -> None:
        """The coordinator is gone: what it began and is before the freeze ends in order; the rest ends by itself."""
        await self._abort_mine()
        if self._tasks:
            await asyncio.wait(self._tasks)
            # What was just being begun has begun now.
            await self._abort_mine()

    async def _abort_mine(self) -> None:
        for migration in list(self._mine):
            try:
                entry = self._host.journal.find(migration.id, migration.side)
                if entry is not None and entry.state in {State.PREPARING, State.PRECOPY}:
                    await migration.abort(self._end_reason)
            except MigrateError as error:
                _log.warning("%s: %s", migration.id, error)

    # ------------------------------------------------------------ requests

    async def _dispatch(self, body: Any) -> Any:
        handler = _HANDLERS.get(type(body))
        if handler is None:
            raise UsageError(f"unknown request {type(body).__name__}")
        return await handler(self, body)

    async def _hello(self, body: m.Hello) -> m.Welcome:
        self._coordinator = body.coordinator or self._peer
        return m.Welcome(
            version=choose_version(body.versions), host=self._host.name, software=SOFTWARE, role=self._role
        )

    async def _host_report(self, _: m.GetHostReport) -> m.HostReportReply:
        return m.HostReportReply(report=await asyncio.to_thread(hostreport.collect, self._host))

    async def _list(self, _: m.ListContainers) -> m.ContainerList:
        found = await asyncio.to_thread(containers.summarize, self._host.runtimes)
        held = {entry.container: entry.migration for entry in self._host.journal.entries(unfinished_only=True)}
        return m.ContainerList(
            containers=[
                item if item.name not in held else containers.with_migration(item, held[item.name]) for item in found
            ]
        )

    async def _inspect(self, body: m.InspectContainer) -> m.ContainerReportReply:
        holder = self._host.journal.holder(body.container)
        if holder is not None:
            raise holder.busy()
        found = await asyncio.to_thread(containers.find, self._host.runtimes, body.container)
        report = await asyncio.to_thread(
            lambda: containers.report(
                found, storage=body.storage, tcp=body.tcp, network=body.network,
                bridge=self._host.settings.network.bridge,
            )
        )  # fmt: skip
        return m.ContainerReportReply(report=report)

    async def _verify(self, body: m.VerifyFiles) -> m.FilesVerified:
        refusals = await asyncio.to_thread(
            containers.verify_files, body.container.bundle, body.container, self._host.name
        )
        return m.FilesVerified(refusals=refusals)

    async def _clock(self, _: m.ReadClock) -> m.ClockReply:
        return m.ClockReply(
            reading=m.ClockReading(
                monotonic_ns=time.monotonic_ns(), boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
                wall_ns=time.time_ns(),
            )
        )  # fmt: skip

    async def _begin_source(self, body: m.BeginSource) -> m.SourceBegun:
        migration = SourceMigration(self._host, body, self._coordinator)
        self._service.add(migration)
        return await self._start(migration, migration.begin())

    async def _prepare_target(self, body: m.PrepareTarget) -> m.TargetPrepared:
        migration = TargetMigration(self._host, body, self._coordinator)
        self._service.add(migration)
        return await self._start(migration, migration.prepare(body.source_address))

    async def _start(self, migration: Migration, coming: Awaitable[T]) -> T:
        self._mine.append(migration)
        try:
            return await coming
        except BaseException:
            self._service.remove(migration)
            self._mine.remove(migration)
            raise

    async def _connect_source(self, body: m.ConnectSource) -> m.SourceConnected:
        return await self._service.source(body.migration).connect(body)

    async def _run_round(self, body: m.RunRound) -> m.RoundDone:
        migration = self._service.source(body.migration)
        before = await migration.counters()
        running = asyncio.ensure_future(migration.run_round(body.round))
        while not (await asyncio.wait({running}, timeout=_PROGRESS_INTERVAL_S))[0]:
            with contextlib.suppress(MigrateError):  # the round itself reports what went wrong
                now = await migration.counters()
                self._send(
                    m.Notice(
                        body=m.Progress(
                            migration=body.migration, phase="precopy", round=body.round,
                            done_bytes=now.page_bytes + now.zero_bytes - before.page_bytes - before.zero_bytes,
                            wire_bytes=now.wire_bytes - before.wire_bytes,
                        )
                    )
                )  # fmt: skip
        return m.RoundDone(report=running.result())

    async def _cut_over(self, body: m.CutOver) -> m.CutOverDone:
        return m.CutOverDone(report=await self._service.source(body.migration).cut_over(body))

    async def _abort(self, body: m.Abort) -> m.Done:
        for migration in self._service.sides(body.migration):
            await migration.abort(body.reason or "aborted on request")
        return m.Done(detail="aborted")

    async def _finish(self, body: m.Finish) -> m.Done:
        entries = self._host.journal.entries(body.migration)
        if entries and all(entry.is_final for entry in entries) and not self._service.has(body.migration):
            return m.Done()  # this process was started after it had ended
        for migration in self._service.sides(body.migration):
            await migration.finish()
        return m.Done()

    async def _status(self, body: m.GetStatus) -> m.StatusReply:
        entries = self._host.journal.entries(body.migration, unfinished_only=body.unfinished_only)
        return m.StatusReply(
            migrations=[
                entry.status(copy_alive=entry.is_final or reclaim.tasks_alive(entry.facts)) for entry in entries
            ]
        )

    async def _settle(self, body: m.Settle) -> m.Done:
        try:
            peer_state = None if body.peer_state == "unknown" else State(body.peer_state)
        except ValueError:
            raise UsageError(f"unknown state {body.peer_state!r}") from None
        return m.Done(detail=(await self._service_settle(body, peer_state)).value)

    async def _service_settle(self, body: m.Settle, peer_state: State | None) -> State:
        for entry in self._host.journal.entries(body.migration):
            if body.epoch < entry.epoch:
                raise UsageError(f"epoch {body.epoch} is older than {entry.epoch} here", host=self._host.name)
            live = self._service.migrations.get((entry.migration, entry.side))
            if live is None and not entry.is_final and not self._host.journal.adopt(entry.migration, entry.side):
                raise BusyError(
                    f"agent process {entry.driver_pid} is still at migration {entry.migration}", host=self._host.name,
                    hint="wait until it has ended, and try again",
                )  # fmt: skip
            match live, entry.side:
                case SourceMigration(), _ if peer_state is not None:
                    return await live.settle(peer_state, body.epoch)
                case TargetMigration(), _:
                    return await live.settle(peer_state, source_is_dead=body.source_is_dead)
                case None, Side.SOURCE if peer_state is not None:
                    return await reclaim.settle_source(self._host, entry.migration, peer_state, body.epoch)
                case None, Side.TARGET:
                    return await reclaim.settle_target(
                        self._host, entry.migration, peer_state, source_is_dead=body.source_is_dead
                    )
        raise UsageError(f"nothing of migration {body.migration} to settle here", host=self._host.name)


_HANDLERS: dict[type[m.Message], Callable[[Session, Any], Awaitable[Any]]] = {
    m.Hello: Session._hello,
    m.GetHostReport: Session._host_report,
    m.ListContainers: Session._list,
    m.InspectContainer: Session._inspect,
    m.VerifyFiles: Session._verify,
    m.ReadClock: Session._clock,
    m.BeginSource: Session._begin_source,
    m.PrepareTarget: Session._prepare_target,
    m.ConnectSource: Session._connect_source,
    m.RunRound: Session._run_round,
    m.CutOver: Session._cut_over,
    m.Abort: Session._abort,
    m.Finish: Session._finish,
    m.GetStatus: Session._status,
    m.Settle: Session._settle,
}
