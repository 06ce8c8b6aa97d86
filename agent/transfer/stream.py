"""What both sides of the stream have in common: the ports to service and engine, the link, and failing once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any

import asyncssh
import structlog

from agent.engine import base
from agent.ipc import AsyncPort, PortClosedError
from agent.kernel.urgent import Urgency
from agent.transfer.link import Link
from protocol import codec
from protocol.errors import LocalProtocolError, MigrateError, PeerError, family_of
from protocol.framing import Frame, FrameKind
from protocol.link_messages import LinkMessage
from protocol.messages import Failure

_log = structlog.get_logger()


class Stream(ABC):
    """One side of the stream. `run` ends when the service closes its port."""

    def __init__(self, service: socket.socket, engine: socket.socket) -> None:
        self._service = AsyncPort(
            service, base.ToStream, "service", on_frame=self._guard(self._service_frame), on_closed=self._end
        )
        self._engine = AsyncPort(
            engine, base.EngineToStream, "engine", on_frame=self._guard(self._engine_frame), on_closed=self._engine_gone
        )
        self._link: Link | None = None
        self._ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._migration = ""
        self._epoch = 0
        # After the engine: the last pages are needed last.
        self._urgency = Urgency(priority=9)
        self.failure: MigrateError | None = None

    async def run(self) -> None:
        """Until the service closes its port; then the link is closed, what is unsent still goes out."""
        await self._ended.wait()
        for task in self._tasks:
            task.cancel()
        if self._link is not None:
            await self._link.close()
        self._close()

    # ------------------------------------------------------------ what a side does

    @abstractmethod
    def _service_request(self, record: Any) -> None: ...

    @abstractmethod
    def _engine_frame(self, frame: Frame) -> None: ...

    @abstractmethod
    def _link_frame(self, frame: Frame) -> None: ...

    @abstractmethod
    def _counters(self) -> base.StreamCounters: ...

    @abstractmethod
    def _close(self) -> None: ...

    # ------------------------------------------------------------ what sides use

    def _make_link(self) -> Link:
        self._link = Link(self._guard(self._link_frame), lambda text: self.fail(PeerError(text, code="link-lost")))
        return self._link

    def _live_link(self) -> Link:
        if self._link is None:
            raise LocalProtocolError("there is no data link yet")
        return self._link

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the rest; an error of it is the stream's."""
        task = asyncio.get_running_loop().create_task(self._watch(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def fail(self, error: MigrateError) -> None:
        """Tell service and engine, once, and close the link. Requests of the service are still answered."""
        if self.failure is not None:
            return
        self.failure = error
        _log.warning("stream failed", code=error.code, error=str(error))
        failure = Failure(
            family=family_of(error), code=error.code, message=error.message, host=error.host, hint=error.hint
        )
        for port in (self._service, self._engine):
            with contextlib.suppress(PortClosedError):
                port.send(base.StreamFailed(failure=failure))
        if self._link is not None:
            self._link.abort()

    def _check_hello(self, payload: bytes) -> None:
        """Raises: MigrateError: not the hello of this migration. RemoteProtocolError: not a message."""
        hello: Any = codec.decode(payload, LinkMessage)
        found = (getattr(hello, "migration", ""), getattr(hello, "epoch", -1))
        if type(hello).__name__ != "LinkHello" or found != (self._migration, self._epoch):
            raise PeerError(
                f"{self._live_link().peer} speaks of migration {found[0]!r}, epoch {found[1]}, "
                f"expected {self._migration!r}, epoch {self._epoch}", code="wrong-migration",
            )  # fmt: skip

    def _be_urgent(self, *, on: bool) -> None:
        """In a freeze we go before other processes of the host."""
        if on:
            self._urgency.begin()
        else:
            self._urgency.end()

    # ------------------------------------------------------------ plumbing

    def _service_frame(self, frame: Frame) -> None:
        if frame.kind is FrameKind.AGENT:
            if self.failure is None:
                self._live_link().send(FrameKind.AGENT, frame.payload)
            return
        record = self._service.parse(frame)
        if isinstance(record, base.StreamGetCounters):
            self._service.send(self._counters())
        else:
            self._service_request(record)

    def _guard(self, handler: Callable[[Frame], None]) -> Callable[[Frame], None]:
        return lambda frame: self._catch(lambda: handler(frame))

    def _catch(self, action: Callable[[], None]) -> None:
        try:
            action()
        except MigrateError as error:
            self.fail(error)

    async def _watch(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except MigrateError as error:
            self.fail(error)
        except (OSError, asyncssh.Error) as error:
            self.fail(PeerError(f"the data link failed: {error or type(error).__name__}", code="link-lost"))

    def _engine_gone(self) -> None:
        self.fail(PortClosedError("the engine process is gone"))

    def _end(self) -> None:
        self._ended.set()
