"""A link to one agent, for trio: connect, ask, hear notices, close."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from migrate.bridge import Bridge
from migrate.inventory import Host
from migrate.session import AgentSession
from protocol import messages
from protocol.errors import RemoteProtocolError

R = TypeVar("R", bound=messages.Message)

ProgressSink = Callable[[messages.Progress], None]


class AgentLink:
    """One agent, greeted. Made by `open_link` or `connect`."""

    def __init__(self, bridge: Bridge, host: Host, session: AgentSession, welcome: messages.Welcome) -> None:
        self._bridge = bridge
        self._session = session
        self.host = host
        self.welcome = welcome

    @property
    def name(self) -> str:
        """The host's name in the inventory."""
        return self.host.name

    async def request(self, body: messages.RequestBody, answer: type[R]) -> R:
        """Ask, and wait for the answer of type `answer`.

        Cancelled, it stops waiting; the agent may go on with what was asked.

        Raises: the error that the agent reported, rebuilt; LinkLostError: the link ended first.
        """
        reply = await self._bridge.run(self._session.request, body, abort=self._session.abort)
        if not isinstance(reply, answer):
            raise RemoteProtocolError(f"{type(reply).__name__} instead of {answer.__name__}", host=self.name)
        return reply

    async def close(self) -> None:
        """End the session; shielded, and bounded by an abort of the connection."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(2.0):
                await self._bridge.run(self._session.close, abort=self._session.abort)
                return
            self._bridge.call_soon(self._session.abort)


async def connect(bridge: Bridge, host: Host, on_progress: ProgressSink | None = None) -> AgentLink:
    """Connect to the agent of `host` and greet it. The caller closes the link.

    Raises: PeerError: unreachable, another host key, or refused (exit status 4).
    """
    token = trio.lowlevel.current_trio_token()

    def hand_over(progress: messages.Progress) -> None:
        if on_progress is None:
            return
        try:
            token.run_sync_soon(on_progress, progress)
        except trio.RunFinishedError:
            return  # nobody looks any more

    session = AgentSession(host, hand_over)
    hello = messages.Hello(versions=list(messages.VERSIONS), software="migrate", coordinator=coordinator_name())
    try:
        welcome = await bridge.run(session.connect, hello, abort=session.abort)
    except BaseException:
        bridge.call_soon(session.abort)
        raise
    return AgentLink(bridge, host, session, welcome)


@asynccontextmanager
async def open_link(bridge: Bridge, host: Host, on_progress: ProgressSink | None = None) -> AsyncIterator[AgentLink]:
    """`connect`, and `close` at the end of the block."""
    link = await connect(bridge, host, on_progress)
    try:
        yield link
    finally:
        await link.close()


def coordinator_name() -> str:
    """Who and where we are, for locks and logs: 'user@host pid 123'."""
    return f"{getpass.getuser()}@{socket.gethostname()} pid {os.getpid()}"
