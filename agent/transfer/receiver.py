"""The target's stream: listens for the source, writes pages into the processes that the engine builds."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from typing import Any

from agent.engine import base
from agent.transfer.compression import Decompressor
from agent.transfer.link import DataListener
from agent.transfer.memory import TaskWriter
from agent.transfer.packets import PacketSink
from agent.transfer.stream import Stream
from protocol.errors import LocalProtocolError, PeerError, RemoteProtocolError
from protocol.framing import Frame, FrameKind
from protocol.pages import PageCodec, decode_batch

_LISTEN_TIMEOUT_S = 300.0
_HELLO_TIMEOUT_S = 5.0
# What waits behind a section that the engine is applying. Reading stops there, packets too: a freeze never has as much.
_MAX_QUEUED_BYTES = 64 << 20


class TargetStream(Stream):
    """Sections, pages and ends of rounds are applied in order; packets and messages do not wait for them."""

    def __init__(self, service: socket.socket, engine: socket.socket) -> None:
        super().__init__(service, engine)
        self._listener: DataListener | None = None
        self._said_hello = asyncio.Event()
        self._queue: deque[Frame] = deque()
        self._queued_bytes = 0
        self._is_section_open = False
        self._is_draining = False
        self._writers: dict[int, TaskWriter] = {}
        self._decompressor = Decompressor()
        self._packets = PacketSink()
        self._page_bytes = self._zero_bytes = self._wire_bytes = 0

    # ------------------------------------------------------------ service

    def _service_request(self, record: Any) -> None:
        match record:
            case base.StreamListen():
                self._start(self._listen(record))
            case base.StreamInject():
                (fd,) = self._service.take_fds(1)
                self._packets.set_socket(fd)
            case base.StreamAttached():
                self._packets.attached()
            case _:
                raise LocalProtocolError(f"{type(record).__name__} is not for the target's stream")

    async def _listen(self, request: base.StreamListen) -> None:
        self._migration, self._epoch = request.migration, request.epoch
        self._listener = DataListener(self._make_link, request.peer_address)
        try:
            port, host_key = await self._listener.start(request.address, request.ports, request.client_public_key)
            self._service.send(base.StreamListening(port=port, host_key=host_key))
            try:
                await asyncio.wait_for(self._listener.authenticated.wait(), _LISTEN_TIMEOUT_S)
            except TimeoutError as error:
                raise PeerError(
                    f"the source did not connect to port {port} within {_LISTEN_TIMEOUT_S:g} s", code="no-connection"
                ) from error
            try:
                await asyncio.wait_for(self._said_hello.wait(), _HELLO_TIMEOUT_S)
            except TimeoutError as error:
                raise PeerError(
                    "the source connected and did not say which migration it is", code="no-hello"
                ) from error
        finally:
            self._listener.close()

    def _counters(self) -> base.StreamCounters:
        return base.StreamCounters(
            page_bytes=self._page_bytes, zero_bytes=self._zero_bytes, wire_bytes=self._wire_bytes,
            packets=self._packets.packets, packets_dropped=self._packets.dropped,
        )  # fmt: skip

    def _close(self) -> None:
        self._packets.close()
        for writer in self._writers.values():
            writer.close()

    # ------------------------------------------------------------ engine

    def _engine_frame(self, frame: Frame) -> None:
        record = self._engine.parse(frame)
        match record:
            case base.OpenTask():
                writer = TaskWriter(record.pid, record.start_time)
                old = self._writers.pop(record.task, None)
                if old is not None:
                    old.close()
                self._writers[record.task] = writer
            case base.SectionApplied():
                if not self._is_section_open:
                    raise LocalProtocolError("the engine applied a section that it was not given")
                self._is_section_open = False
                self._drain_queue()
            case base.Urgent():
                self._be_urgent(on=record.on)
            case base.ReleasePackets():
                self._packets.release(record.receive_next)
            case _:
                raise LocalProtocolError(f"{type(record).__name__} is not for the target's stream")

    # ------------------------------------------------------------ link

    def _link_frame(self, frame: Frame) -> None:
        if not self._said_hello.is_set():
            self._hello(frame)
            return
        match frame.kind:
            case FrameKind.AGENT:
                self._service.send_frame(FrameKind.AGENT, frame.payload)
            case FrameKind.PACKET:
                self._packets.put(frame.payload)
            case FrameKind.SECTION | FrameKind.PAGES | FrameKind.ROUND_END:
                if self._is_section_open or self._queue:
                    self._enqueue(frame)
                else:
                    self._apply(frame)
            case _:
                raise RemoteProtocolError(f"a {frame.kind.name} frame came from the source")

    def _hello(self, frame: Frame) -> None:
        if frame.kind is not FrameKind.AGENT:
            raise RemoteProtocolError(f"a {frame.kind.name} frame came before the hello")
        self._check_hello(frame.payload)
        self._said_hello.set()
        # The same hello back: the source knows that it is at the right place.
        self._live_link().send(FrameKind.AGENT, frame.payload)
        self._service.send(base.StreamUp(peer=self._live_link().peer))

    def _enqueue(self, frame: Frame) -> None:
        self._queue.append(frame)
        self._queued_bytes += len(frame.payload)
        if self._queued_bytes > _MAX_QUEUED_BYTES:
            self._live_link().pause_reading()

    def _drain_queue(self) -> None:
        """Apply what waited, up to the next section; a few at a time, so that packets get their turn."""
        self._is_draining = False
        for _ in range(4):
            if not self._queue or self._is_section_open or self.failure is not None:
                return
            frame = self._queue.popleft()
            before, self._queued_bytes = self._queued_bytes, self._queued_bytes - len(frame.payload)
            if before > _MAX_QUEUED_BYTES >= self._queued_bytes:
                self._live_link().resume_reading()
            self._apply(frame)
        if self._queue and not self._is_draining:
            self._is_draining = True
            asyncio.get_running_loop().call_soon(self._guarded_drain)

    def _guarded_drain(self) -> None:
        self._catch(self._drain_queue)

    def _apply(self, frame: Frame) -> None:
        self._wire_bytes += len(frame.payload)
        match frame.kind:
            case FrameKind.SECTION:
                self._is_section_open = True
                self._engine.send_frame(FrameKind.SECTION, frame.payload)
            case FrameKind.PAGES:
                self._write(frame.payload)
            case _:
                self._live_link().send(FrameKind.ROUND_ACK, frame.payload)

    def _write(self, payload: bytes) -> None:
        batch = decode_batch(payload)
        writer = self._writers.get(batch.task)
        if writer is None:
            raise RemoteProtocolError(f"pages came for task {batch.task}, which the engine has not opened")
        if batch.codec is PageCodec.ZERO:
            self._zero_bytes += batch.raw_bytes
            writer.write_zeros(batch.runs)
            return
        self._page_bytes += batch.raw_bytes
        self._urgency.relax()
        writer.write(batch.runs, self._decompressor.unpack(batch))
