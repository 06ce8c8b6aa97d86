"""A coordinator for tests: the real protocol over real SSH, with nothing of the real coordinator's own policy."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncssh

from agent.kernel.namespaces import in_network_namespace
from protocol import messages as m
from protocol.connection import NEED_DATA, Connection, ConnectionClosed, Role
from tests.lab.containers import ContainerHost
from tests.lab.host import AGENT_PORT

SUBSYSTEM = "migrate-agent"
_TIMEOUT_S = 20.0


class Coordinator:
    """One conversation with an agent."""

    def __init__(self, process: asyncssh.SSHClientProcess[bytes]) -> None:
        self.process = process
        self.connection = Connection(Role.COORDINATOR)
        self.notices: list[m.Notice] = []
        self.closed: ConnectionClosed | None = None

    async def hello(self) -> m.Welcome:
        answer = await self.ask(m.Hello(versions=[1], software="test", coordinator="ann@desk"))
        assert isinstance(answer, m.Welcome), answer
        return answer

    async def ask(self, body: Any) -> Any:
        """The answer, Failure too. Raises: ProtocolError: the agent broke it. ConnectionError: the session ended."""
        number = self.connection.next_number
        self.write(self.connection.send(m.Request(number=number, body=body)))
        while (event := await self.event()) is not None:
            if isinstance(event, m.Reply) and event.number == number:
                return event.body
        raise ConnectionResetError("the agent ended the session")

    def write(self, data: bytes) -> None:
        self.process.stdin.write(data)

    async def event(self) -> m.Control | None:
        """The next message; None: the agent has ended the session."""
        async with asyncio.timeout(_TIMEOUT_S):
            while True:
                event = self.connection.next_event()
                if isinstance(event, ConnectionClosed):
                    self.closed = event
                    return None
                if event is not NEED_DATA:
                    return event
                self.connection.receive_data(await self.process.stdout.read(1 << 16))
                if answer := self.connection.data_to_send():
                    self.write(answer)

    async def until_closed(self) -> None:
        """Wait for the end of the session; what came before it is thrown away."""
        while await self.event() is not None:
            pass


def dial(host: ContainerHost, port: int) -> socket.socket:
    """A connection made inside the lab's LAN, for this process to use."""
    with in_network_namespace(f"/proc/{host.pid}/ns/net"):
        sock = socket.create_connection((host.address, port), 5)
    sock.setblocking(False)
    return sock


@contextlib.asynccontextmanager
async def connect(
    host: ContainerHost, identity: Path, *, port: int = AGENT_PORT
) -> AsyncIterator[asyncssh.SSHClientConnection]:
    """An authenticated SSH connection, the host key pinned."""
    pinned = asyncssh.import_public_key(host.host_key)
    sock = await asyncio.to_thread(dial, host, port)
    async with asyncssh.connect(
        sock=sock, host=host.address, username="root", client_keys=[str(identity)], known_hosts=([pinned], [], []),
        config=None, agent_path=None,
    ) as connection:  # fmt: skip
        yield connection


@contextlib.asynccontextmanager
async def session(
    host: ContainerHost, identity: Path, *, port: int = AGENT_PORT, command: str | None = None
) -> AsyncIterator[Coordinator]:
    """A session on a connection of its own, before Hello; `command` over an sshd, else the agent's subsystem."""
    async with connect(host, identity, port=port) as connection:
        subsystem = None if command else SUBSYSTEM
        async with connection.create_process(command, subsystem=subsystem, encoding=None) as process:
            yield Coordinator(process)
