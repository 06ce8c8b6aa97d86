"""The processes of one side of one migration: an engine and a stream, and how the service talks to them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from agent import ipc
from agent.engine import base
from protocol import codec
from protocol.errors import MigrateError, RemoteProtocolError, error_from_wire
from protocol.framing import Frame, FrameKind
from protocol.link_messages import LinkAbort, LinkFailed, LinkMessage
from protocol.messages import Failure, Message
from protocol.states import Side

R = TypeVar("R", bound=msgspec.Struct)
# A process that was told to end gets this long before it is killed; the engine may have a container to put back.
_EXIT_TIMEOUT_S = 5.0


def raise_failure(failure: Failure) -> MigrateError:
    """The error that a failure record stands for."""
    return error_from_wire(
        family=failure.family, code=failure.code, message=failure.message, host=failure.host, hint=failure.hint
    )


class _Inbox:
    """Records that arrived, and those who wait for one. A failure reaches every waiter, now and later."""

    def __init__(self) -> None:
        self._waiting: list[tuple[tuple[type, ...], asyncio.Future[Any]]] = []
        self._kept: list[msgspec.Struct] = []
        self.error: MigrateError | None = None
        self._is_closed = False

    def put(self, record: msgspec.Struct) -> None:
        # One that was cancelled waits no more: the record is for the next, or is kept.
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]
        for index, (types, future) in enumerate(self._waiting):
            if isinstance(record, types):
                del self._waiting[index]
                future.set_result(record)
                return
        self._kept.append(record)

    def fail(self, error: MigrateError, *, lasting: bool, closed: bool = False) -> None:
        """Every waiter gets `error`; with `lasting` so do those who wait later. `closed`: nothing comes any more."""
        self._is_closed |= closed
        if lasting and self.error is None:
            self.error = error
        waiting, self._waiting = self._waiting, []
        for _, future in waiting:
            if not future.done():
                future.set_exception(error)

    async def get(self, *types: type[R], despite_failure: bool = False) -> R:
        """The next record of these types. `despite_failure`: also from a process that has failed and still answers."""
        for index, record in enumerate(self._kept):
            if isinstance(record, types):
                del self._kept[index]
                return record
        if self.error is not None and (self._is_closed or not despite_failure):
            raise self.error
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((types, future))
        return await future


class Worker:
    """One child process with a port to it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process
        self.inbox = _Inbox()
        self.port: ipc.AsyncPort
        self.on_link_frame: Callable[[bytes], None] | None = None
        self.on_lost: Callable[[MigrateError], None] | None = None

    def _frame(self, frame: Frame) -> None:
        if frame.kind is FrameKind.AGENT and self.on_link_frame is not None:
            self.on_link_frame(frame.payload)
            return
        try:
            record = self.port.parse(frame)
        except RemoteProtocolError as unreadable:
            error = MigrateError(f"the {self.name} process is not understood: {unreadable}", code="process")
            self.inbox.fail(error, lasting=True)
            self._tell(error)
            return
        match record:
            case base.EngineFailed():
                self.inbox.fail(raise_failure(record.failure), lasting=False)
                self._tell(raise_failure(record.failure))
            case base.StreamFailed():
                error = raise_failure(record.failure)
                self.inbox.fail(error, lasting=True)
                self._tell(error)
            case _:
                self.inbox.put(record)

    def _tell(self, error: MigrateError) -> None:
        if self.on_lost is not None:
            self.on_lost(error)

    def _closed(self) -> None:
        error = ipc.PortClosedError(f"the {self.name} process ended unexpectedly")
        self.inbox.fail(error, lasting=True, closed=True)
        self._tell(error)

    async def ask(
        self, record: msgspec.Struct, *answers: type[R], fds: Sequence[int] = (), despite_failure: bool = False
    ) -> R:
        """Send a request and wait for one of its answers. Raises: what the process reported, or that it is gone."""
        self.port.send(record, fds)
        return await self.inbox.get(*answers, despite_failure=despite_failure)

    async def close(self) -> None:
        """End the process: closing the port tells it to; it is killed if it does not listen.

        Whoever still waits for it is told.
        """
        self.port.close()
        self.inbox.fail(MigrateError(f"the {self.name} process was ended", code="ended"), lasting=True, closed=True)
        try:
            await asyncio.wait_for(self.process.wait(), _EXIT_TIMEOUT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()


class Workers:
    """Engine and stream of one side, joined to each other.

    `on_lost` is called with every failure that one of them reports, and when one of them dies.
    Messages of the other agent are taken by `link_message`.
    """

    def __init__(self, engine: Worker, stream: Worker, on_lost: Callable[[MigrateError], None]) -> None:
        self.engine = engine
        self.stream = stream
        self.link = _Inbox()
        self._on_lost = on_lost
        stream.on_link_frame = self._link_frame
        engine.on_lost = on_lost
        stream.on_lost = self._stream_lost

    @classmethod
    async def start(cls, side: Side, on_lost: Callable[[MigrateError], None]) -> Workers:
        """Start both processes. Raises: MigrateError: they cannot be started."""
        engine_end, stream_end = ipc.make_pair()
        try:
            is_source = side is Side.SOURCE
            heard = base.FromSourceEngine if is_source else base.FromTargetEngine
            engine = await _spawn("engine", "agent.engine.native.main", side, ("--stream-fd", engine_end), heard)
            try:
                stream = await _spawn(
                    "stream", "agent.transfer.main", side, ("--engine-fd", stream_end), base.FromStream
                )
            except BaseException:
                await engine.close()
                raise
        finally:
            engine_end.close()
            stream_end.close()
        return cls(engine, stream, on_lost)

    def _link_frame(self, payload: bytes) -> None:
        try:
            message: LinkMessage = codec.decode(payload, LinkMessage)
        except RemoteProtocolError as unreadable:
            error = MigrateError(f"the other agent is not understood: {unreadable}", code="link-lost")
            self.link.fail(error, lasting=True)
            self._on_lost(error)
            return
        match message:
            case LinkFailed():
                error = raise_failure(message.failure)
                self.link.fail(error, lasting=True)
                self._on_lost(error)
            case LinkAbort():
                error = MigrateError(f"the source aborted: {message.reason}", code="aborted-by-peer")
                self.link.fail(error, lasting=True)
                self._on_lost(error)
            case _:
                self.link.put(message)

    def _stream_lost(self, error: MigrateError) -> None:
        self.link.fail(error, lasting=True)
        self._on_lost(error)

    def send_link(self, message: Message) -> None:
        """To the other agent, over the data link."""
        self.stream.port.send_frame(FrameKind.AGENT, codec.encode(message))

    async def close(self) -> None:
        """End both."""
        self.engine.on_lost = self.stream.on_lost = None
        self.link.fail(MigrateError("the data link was closed", code="ended"), lasting=True)
        await asyncio.gather(self.engine.close(), self.stream.close())


async def _spawn(name: str, module: str, side: Side, extra: tuple[str, Any], heard: Any) -> Worker:
    ours, theirs = ipc.make_pair()
    option, other = extra
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", module, "--side", side.value, "--service-fd", str(theirs.fileno()),
            option, str(other.fileno()), pass_fds=[theirs.fileno(), other.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            # The agent's own stdout may be the control connection (--stdio); a child must not write there.
            stdout=asyncio.subprocess.DEVNULL,
            # A signal from the terminal is the agent's to handle; the children see their sockets close.
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        ours.close()
        raise MigrateError(f"cannot start the {name} process: {error}", code="process") from error
    finally:
        theirs.close()
    worker = Worker(name, process)
    worker.port = ipc.AsyncPort(ours, heard, name, on_frame=worker._frame, on_closed=worker._closed)
    return worker
