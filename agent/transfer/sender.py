"""The source's stream: reads pages where the engine says so, and sends them; catches packets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from agent.engine import base
from agent.transfer import link
from agent.transfer.compression import Compressor
from agent.transfer.memory import Runs, TaskReader, cut_runs, split_zero
from agent.transfer.packets import PacketSource
from agent.transfer.ratelimit import TokenBucket
from agent.transfer.stream import Stream
from protocol import codec
from protocol.errors import LocalProtocolError, MigrateError, RemoteProtocolError
from protocol.framing import Frame, FrameKind
from protocol.link_messages import LinkHello
from protocol.pages import PageBatch, PageCodec, encode_batch

BATCH_BYTES = 1 << 20
# Frames of the engine that wait here; beyond it is left in the socket, where the engine feels it.
_MAX_QUEUED_BYTES = 4 << 20
_NUMBER_BYTES = 4
# A freeze of milliseconds needs no packets at the target; a longer one must not let them pile up.
_HOLD_PACKETS_S = 0.1


class _Totals(msgspec.Struct):
    """Since the last Flush."""

    read_bytes: int = 0
    zero_bytes: int = 0
    wire_bytes: int = 0
    start_s: float = 0.0


class SourceStream(Stream):
    """Frames of the engine are worked off in their order by one task; packets and messages go past them."""

    def __init__(self, service: socket.socket, engine: socket.socket) -> None:
        super().__init__(service, engine)
        self._key = link.make_client_key()
        self._queue: deque[tuple[Frame, Any]] = deque()
        self._queued_bytes = 0
        self._work_arrived = asyncio.Event()
        self._is_working = False
        # Set as soon as a read of the freeze is seen, however far back in the queue: from then nothing is throttled.
        self._unthrottled = asyncio.Event()
        self._readers: dict[int, TaskReader] = {}
        self._buffer = memoryview(bytearray(BATCH_BYTES))
        self._compressor = Compressor("none")
        self._bucket = TokenBucket(0, time.monotonic())
        self._packets = PacketSource(self._send_packets)
        self._totals = _Totals()
        self._page_bytes = self._zero_bytes = self._wire_bytes = 0
        self._flushing: deque[tuple[int, _Totals]] = deque()
        self._hello_answered = asyncio.Event()
        self._start(self._work_off())

    def fail(self, error: MigrateError) -> None:
        super().fail(error)
        # Whoever waits for the bandwidth limit shall see it.
        self._unthrottled.set()

    # ------------------------------------------------------------ service

    def _service_request(self, record: Any) -> None:
        match record:
            case base.StreamMakeKey():
                public_key = self._key.export_public_key("openssh").decode("ascii").strip()
                self._service.send(base.StreamKey(public_key=public_key))
            case base.StreamConnect():
                self._start(self._connect(record))
            case base.StreamReplay():
                (fd,) = self._service.take_fds(1)
                self._service.send(base.StreamReplayed(packets=self._packets.replay_into(fd)))
            case _:
                raise LocalProtocolError(f"{type(record).__name__} is not for the source's stream")

    async def _connect(self, request: base.StreamConnect) -> None:
        self._migration, self._epoch = request.migration, request.epoch
        self._compressor = Compressor(request.compress)
        self._bucket = TokenBucket(request.bandwidth, time.monotonic())
        connected = await link.connect(request, self._key, self._make_link)
        connected.send(FrameKind.AGENT, codec.encode(LinkHello(migration=request.migration, epoch=request.epoch)))
        await self._hello_answered.wait()
        self._service.send(base.StreamUp(peer=connected.peer))

    def _counters(self) -> base.StreamCounters:
        return base.StreamCounters(
            page_bytes=self._page_bytes, zero_bytes=self._zero_bytes, wire_bytes=self._wire_bytes,
            packets=self._packets.packets, packets_dropped=self._packets.dropped,
        )  # fmt: skip

    def _close(self) -> None:
        self._packets.close()
        for reader in self._readers.values():
            reader.close()

    # ------------------------------------------------------------ link

    def _link_frame(self, frame: Frame) -> None:
        match frame.kind:
            case FrameKind.AGENT if self._hello_answered.is_set():
                self._service.send_frame(FrameKind.AGENT, frame.payload)
            case FrameKind.AGENT:
                self._check_hello(frame.payload)
                self._hello_answered.set()
            case FrameKind.ROUND_ACK:
                self._round_applied(frame.payload)
            case _:
                raise RemoteProtocolError(f"a {frame.kind.name} frame came from the target")

    def _round_applied(self, payload: bytes) -> None:
        number = int.from_bytes(payload, "big")
        if not self._flushing or self._flushing[0][0] != number:
            raise RemoteProtocolError(f"the target acknowledged {number}, which is not what was asked for")
        _, totals = self._flushing.popleft()
        self._engine.send(
            base.Flushed(
                number=number, read_bytes=totals.read_bytes, zero_bytes=totals.zero_bytes,
                wire_bytes=totals.wire_bytes, ms=(time.monotonic() - totals.start_s) * 1e3,
            )
        )  # fmt: skip

    def _send_packets(self, packets: Sequence[bytes]) -> None:
        if self._link is not None and self.failure is None:
            self._link.send_many(FrameKind.PACKET, packets)

    # ------------------------------------------------------------ engine

    def _engine_frame(self, frame: Frame) -> None:
        if self.failure is not None:
            return
        record = self._engine.parse(frame) if frame.kind is FrameKind.LOCAL else None
        match record:
            case base.CapturePackets():
                # Not in the queue: the container is cut off, each moment counts.
                (fd,) = self._engine.take_fds(1)
                self._packets.add(fd)
                return
            case base.Urgent():
                self._be_urgent(on=record.on)
                if record.on:
                    self._packets.hold(_HOLD_PACKETS_S)
                else:
                    self._packets.forward()
                return
            case base.ReadRuns(final=True):
                self._unthrottled.set()
        if not self._is_working and not self._queue and not isinstance(record, base.ReadRuns):
            # Nothing is before it: in the freeze a turn of the event loop counts.
            self._handle(frame, record)
            return
        self._queue.append((frame, record))
        self._queued_bytes += len(frame.payload)
        if self._queued_bytes > _MAX_QUEUED_BYTES:
            self._engine.pause()
        self._work_arrived.set()

    async def _work_off(self) -> None:
        while True:
            await self._work_arrived.wait()
            self._is_working = True
            while self._queue:
                frame, record = self._queue.popleft()
                self._queued_bytes -= len(frame.payload)
                if self.failure is None:
                    if isinstance(record, base.ReadRuns):
                        await self._send_runs(record)
                    else:
                        self._handle(frame, record)
                        await self._live_link().drain()
                if self._queued_bytes <= _MAX_QUEUED_BYTES:
                    self._engine.resume()
            self._is_working = False
            self._work_arrived.clear()

    def _handle(self, frame: Frame, record: Any) -> None:
        """Whatever is done at once."""
        if frame.kind is FrameKind.SECTION:
            self._send_counted(FrameKind.SECTION, frame.payload)
            return
        match record:
            case base.OpenTask():
                self._open(record)
            case base.ForwardPackets():
                self._packets.forward()
            case base.Flush():
                totals, self._totals = self._totals, _Totals()
                totals.start_s = totals.start_s or time.monotonic()
                self._flushing.append((record.number, totals))
                self._live_link().send(FrameKind.ROUND_END, record.number.to_bytes(_NUMBER_BYTES, "big"))
            case _:
                raise LocalProtocolError(f"{frame.kind.name} {type(record).__name__} is not for the source's stream")

    def _open(self, record: base.OpenTask) -> None:
        reader = TaskReader(record.pid, record.start_time)
        old = self._readers.pop(record.task, None)
        if old is not None:
            old.close()
        self._readers[record.task] = reader

    async def _send_runs(self, request: base.ReadRuns) -> None:
        reader = self._readers.get(request.task)
        if reader is None:
            raise LocalProtocolError(f"task {request.task} was not opened")
        self._note_start()
        for wanted in cut_runs(request.starts, request.sizes, BATCH_BYTES):
            sent_bytes = self._send_batch(reader, request, wanted)
            self._urgency.relax()
            start_s = time.monotonic()
            await self._live_link().drain()
            if not self._unthrottled.is_set():
                await self._throttle(sent_bytes, start_s)
            if self.failure is not None:
                return

    def _send_batch(self, reader: TaskReader, request: base.ReadRuns, wanted: Runs) -> int:
        """Read and send one batch; gives its bytes on the link."""
        runs = reader.read(wanted, self._buffer)
        size_bytes = sum(size for _, size in runs)
        data: memoryview | bytes = self._buffer[:size_bytes]
        self._totals.read_bytes += size_bytes
        self._page_bytes += size_bytes
        sent_bytes = 0
        if request.anonymous and not request.final and runs:
            runs, zero_runs, data = split_zero(runs, self._buffer[:size_bytes])
            if zero_runs:
                sent_bytes += self._send_zero(request.task, zero_runs)
        if runs:
            codec_used, packed = self._compressor.pack(data)
            start_s = time.perf_counter()
            batch = PageBatch(task=request.task, runs=runs, codec=codec_used, raw_bytes=len(data), data=packed)
            sent_bytes += self._send_counted(FrameKind.PAGES, *encode_batch(batch))
            self._write_s = time.perf_counter() - start_s
        return sent_bytes

    def _send_zero(self, task: int, runs: Runs) -> int:
        zero_bytes = sum(size for _, size in runs)
        self._totals.zero_bytes += zero_bytes
        self._zero_bytes += zero_bytes
        batch = PageBatch(task=task, runs=runs, codec=PageCodec.ZERO, raw_bytes=zero_bytes, data=b"")
        return self._send_counted(FrameKind.PAGES, *encode_batch(batch))

    async def _throttle(self, sent_bytes: int, start_s: float) -> None:
        """Keep the bandwidth limit, and tell the compressor what the link does."""
        wait_s = self._bucket.spend(sent_bytes, time.monotonic())
        if wait_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._unthrottled.wait(), wait_s)
        self._compressor.note_sent(sent_bytes, self._write_s + time.monotonic() - start_s)

    _write_s = 0.0  # seconds that encrypting and writing the last batch took

    def _send_counted(self, kind: FrameKind, *parts: bytes | bytearray | memoryview) -> int:
        sent_bytes = self._live_link().send(kind, *parts)
        self._note_start()
        self._totals.wire_bytes += sent_bytes
        self._wire_bytes += sent_bytes
        return sent_bytes

    def _note_start(self) -> None:
        if self._totals.start_s == 0:
            self._totals.start_s = time.monotonic()
