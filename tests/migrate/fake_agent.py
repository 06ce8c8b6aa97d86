"""An agent that speaks the protocol over a real SSH server and moves nothing: for tests of the coordinator."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

import asyncssh

from migrate.errors import failure_of
from protocol import messages as m
from protocol.connection import NEED_DATA, Connection, ConnectionClosed, Role
from protocol.errors import MigrateError

MIB = 1 << 20

Answer = m.ReplyBody | Awaitable[m.ReplyBody]
Handler = Callable[[Any, "FakeAgent"], Answer]


class DropConnectionError(Exception):
    """Raised by a handler: cut the SSH connection instead of answering."""


class LoopThread:
    """An asyncio loop in a thread, for all fake agents of a test."""

    def __enter__(self) -> Self:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._cancel_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()

    def run(self, coroutine: Any) -> Any:
        """Run in the loop, wait for the result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    async def _cancel_all(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class FakeAgent:
    """One host's agent. `handlers` replace the answers that a healthy agent would give."""

    def __init__(
        self, thread: LoopThread, name: str, client_key: asyncssh.SSHKey, *, containers: tuple[str, ...] = ()
    ) -> None:
        self.thread = thread
        self.name = name
        self.host_key = asyncssh.generate_private_key("ssh-ed25519")
        self.containers = list(containers)
        self.report = host_report(name, containers=list(containers))
        self.container = container_report()
        self.state: dict[str, str] = {}
        self.side: dict[str, str] = {}
        self.requests: list[m.RequestBody] = []
        self.arrived = asyncio.Condition()
        self.handlers: dict[type, Handler] = {}
        self.clock_offset_ns = 0
        self._client_key = client_key
        self._server: Any = None
        self._connections: set[asyncssh.SSHServerConnection] = set()

    # ------------------------------------------------------------ life

    def start(self, port: int = 0) -> FakeAgent:
        """Listen."""
        self.thread.run(self._start(port))
        return self

    def stop(self) -> None:
        """Power cut: no more connections, the ones there are cut."""
        self.thread.run(self._stop())

    @property
    def port(self) -> int:
        return int(self._server.get_port())

    async def _start(self, port: int) -> None:
        keys = asyncssh.import_authorized_keys(self._client_key.export_public_key().decode())
        agent = self

        class Server(asyncssh.SSHServer):
            def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
                agent._connections.add(conn)

        self._server = await asyncssh.listen(
            "127.0.0.1", port, server_factory=Server, server_host_keys=[self.host_key], authorized_client_keys=keys,
            process_factory=self._serve, encoding=None, reuse_address=True,
        )  # fmt: skip

    async def _stop(self) -> None:
        self._server.close()
        for connection in self._connections:
            connection.abort()
        await self._server.wait_closed()

    # ------------------------------------------------------------ the conversation

    async def _serve(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        assert process.subsystem == "migrate-agent" or process.command == "migrate-agent --stdio"
        connection = Connection(Role.AGENT)
        tasks: set[asyncio.Task[None]] = set()
        while True:
            data = await process.stdin.read(65536)
            connection.receive_data(data)
            while (event := connection.next_event()) is not NEED_DATA:
                if isinstance(event, ConnectionClosed):
                    process.exit(0)
                    return
                assert isinstance(event, m.Request)
                task = asyncio.create_task(self._answer(process, connection, event))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            process.stdout.write(connection.data_to_send())

    async def _answer(self, process: Any, connection: Connection, request: m.Request) -> None:
        async with self.arrived:
            self.requests.append(request.body)
            self.arrived.notify_all()
        try:
            handler = self.handlers.get(type(request.body))
            body = handler(request.body, self) if handler is not None else self.healthy(request.body)
            if inspect.isawaitable(body):
                body = await body
        except MigrateError as error:
            body = failure_of(error)
        except DropConnectionError:
            process.channel.get_connection().abort()
            return
        if not process.channel.is_closing():
            process.stdout.write(connection.send(m.Reply(number=request.number, body=body)))

    def healthy(self, body: m.RequestBody) -> m.ReplyBody:
        """What an agent answers when all goes well."""
        match body:
            case m.Hello():
                return m.Welcome(version=1, host=self.name, software="fake")
            case m.GetHostReport():
                return m.HostReportReply(report=self.report)
            case m.ListContainers():
                return m.ContainerList(
                    containers=[
                        m.ContainerSummary(name=name, runtime="runc", status="running", pid=7, memory_bytes=64 * MIB)
                        for name in self.containers
                    ]
                )
            case m.InspectContainer():
                return m.ContainerReportReply(report=self.container)
            case m.VerifyFiles():
                return m.FilesVerified(refusals=[])
            case m.ReadClock():
                now_ns = time.monotonic_ns() + self.clock_offset_ns
                return m.ClockReply(
                    reading=m.ClockReading(monotonic_ns=now_ns, boottime_ns=now_ns, wall_ns=time.time_ns())
                )
            case m.BeginSource(migration=migration):
                self.state[migration], self.side[migration] = "preparing", "source"
                return m.SourceBegun(client_public_key="ssh-ed25519 AAAA", report=self.container)
            case m.PrepareTarget(migration=migration):
                self.state[migration], self.side[migration] = "preparing", "target"
                return m.TargetPrepared(port=7100, host_key="ssh-ed25519 AAAA")
            case m.ConnectSource(migration=migration):
                self.state[migration] = "precopy"
                return m.SourceConnected(armed_ms=1.0)
            case m.RunRound():
                return m.RoundDone(report=healthy_round(body.round))
            case m.CutOver(migration=migration):
                self.state[migration] = "running"
                return m.CutOverDone(report=cut_over_report())
            case m.Abort(migration=migration):
                if migration in self.state:
                    self.state[migration] = "aborted" if self.side[migration] == "source" else "discarded"
                return m.Done()
            case m.Finish(migration=migration):
                self.state[migration] = "finished"
                return m.Done()
            case m.GetStatus():
                return m.StatusReply(
                    migrations=[self.status(name) for name in self.state if body.migration in {"", name}]
                )
            case m.Settle(migration=migration):
                self.state[migration] = "finished"
                return m.Done(detail="finished")
        raise AssertionError(body)

    def status(self, migration: str) -> m.MigrationStatus:
        return m.MigrationStatus(
            migration=migration, epoch=1, side=self.side[migration], state=self.state[migration], container="web1",
            peer="other", since=1.0, started=1.0,
        )  # fmt: skip

    # ------------------------------------------------------------ what a test asks

    def asked(self, kind: type) -> list[Any]:
        """The requests of one kind so far."""
        return [body for body in self.requests if isinstance(body, kind)]

    def wait_asked(self, kind: type) -> None:
        """Wait until a request of that kind has arrived."""

        async def wait() -> None:
            async with self.arrived:
                await self.arrived.wait_for(lambda: bool(self.asked(kind)))

        self.thread.run(wait())


def host_report(name: str, **changes: Any) -> m.HostReport:
    """A capable host."""
    fields: dict[str, Any] = {
        "host": name,
        "architecture": "x86_64",
        "kernel": "6.18.0",
        "agent_version": "0.1.0",
        "features": dict.fromkeys(
            (
                "pagemap_scan",
                "wp_async",
                "pidfd_getfd",
                "tcp_repair",
                "time_namespace",
                "freezer",
                "ns_last_pid",
                "packet_socket",
                "root",
            ),
            True,
        ),
        "cpu_model": "Test CPU",
        "cpu_flags": ["avx", "sse2"],
        "xstate_bytes": 2696,
        "vdso_digest": "d1",
        "memory_available": 4096 * MIB,
        "runtimes": [m.RuntimeInfo(kind="runc", version="1.1.5", root="/run/runc")],
        "bridge": "cbr0",
        "wall_clock": 1000.0,
        "state_dir_free": 1024 * MIB,
    }
    return m.HostReport(**(fields | changes))


def container_report(**changes: Any) -> m.ContainerReport:
    """A redis with one connection."""
    fields: dict[str, Any] = {
        "name": "web1",
        "runtime": "runc",
        "status": "running",
        "pid": 4711,
        "bundle": "/srv/web1",
        "config_json": b"{}",
        "memory_bytes": 64 * MIB,
        "processes": 1,
        "threads": 5,
        "connections": 1,
        "network": m.Network(
            kind="namespace",
            path="/run/netns/web1",
            interfaces=[m.Interface(name="eth0", mac="02:00:00:00:00:01", mtu=1500, bridge="cbr0", host_name="v1")],
        ),
    }
    return m.ContainerReport(**(fields | changes))


def healthy_round(number: int) -> m.RoundReport:
    """Round 0 copies all; after the next nothing is left."""
    if number == 0:
        return m.RoundReport(
            round=0, dirty_bytes=64 * MIB, sent_bytes=60 * MIB, wire_bytes=20 * MIB, ms=300.0, scan_ms=1.0,
            remaining_bytes=4 * MIB,
        )  # fmt: skip
    return m.RoundReport(
        round=number,
        dirty_bytes=4 * MIB,
        sent_bytes=4 * MIB,
        wire_bytes=MIB,
        ms=20.0,
        scan_ms=1.0,
        remaining_bytes=4096,
    )


def cut_over_report(**changes: Any) -> m.CutOverReport:
    """12.5 ms."""
    fields: dict[str, Any] = {
        "outcome": "running",
        "downtime_ms": 12.5,
        "parts": {"freeze": 0.5, "scan": 1.0, "dump": 3.0, "copy": 2.0, "restore": 4.0, "commit": 2.0},
        "dirty_bytes": 4096,
        "sent_bytes": 4096,
        "wire_bytes": 2048,
        "pids": [1],
        "connections": 1,
    }
    return m.CutOverReport(**(fields | changes))
