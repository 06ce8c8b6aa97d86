"""The sockets between the processes of one agent: service, engine, stream.

Each pair shares a `socketpair(AF_UNIX, SOCK_STREAM)`. What travels is the framing of the wire: LOCAL frames hold
one typed record, other kinds pass through unread. File descriptors ride on a frame (SCM_RIGHTS) and are queued in
order at the receiver, who takes as many as the record says there are.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from protocol import codec
from protocol.errors import PeerError, RemoteProtocolError
from protocol.framing import Frame, FrameDecoder, FrameKind, encode_frame

# The kernel's SCM_MAX_FD is 253; a frame carries at most this many.
MAX_FDS_PER_FRAME = 250
_READ_BYTES = 1 << 18
_BUFFER_BYTES = 4 << 20
# asm-generic/socket.h: as SO_SNDBUF, above net.core.wmem_max (200 KiB as it comes); needs CAP_NET_ADMIN.
_SO_SNDBUFFORCE = 32


def make_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets with room for a frame of pages, so that a sender seldom blocks."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (ours, theirs):
        try:
            end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER_BYTES)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return ours, theirs


class PortClosedError(PeerError):
    """The process at the other end is gone."""

    code = "process-gone"


class _Receiver:
    """The receiving half, shared by the blocking and the asyncio port."""

    def __init__(self, sock: socket.socket, record_type: Any, name: str) -> None:
        self.socket = sock
        self.name = name
        self._record_type = record_type
        self._decoder = FrameDecoder()
        self._frames: deque[Frame] = deque()
        self._fds: deque[int] = deque()

    def _read(self, flags: int = 0) -> bool:
        """Take what is there. False: nothing now. Raises: PortClosedError."""
        try:
            data, ancillary, _, _ = self.socket.recvmsg(
                _READ_BYTES, socket.CMSG_SPACE(MAX_FDS_PER_FRAME * 4), flags | socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionError as error:
            raise PortClosedError(f"the {self.name} process is gone") from error
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds.extend(fds)
        if not data:
            raise PortClosedError(f"the {self.name} process is gone")
        try:
            self._frames.extend(self._decoder.feed(data))
        except RemoteProtocolError as error:
            raise PortClosedError(f"the {self.name} process sent what is no frame: {error}") from error
        return True

    def take_fds(self, count: int) -> list[int]:
        """The next `count` descriptors, in the order they were sent; the caller closes them."""
        if len(self._fds) < count:
            raise PortClosedError(f"the {self.name} process promised {count} descriptors and sent {len(self._fds)}")
        return [self._fds.popleft() for _ in range(count)]

    def parse(self, frame: Frame) -> Any:
        """The typed record of a LOCAL frame."""
        return codec.decode(frame.payload, self._record_type)

    def _close(self) -> None:
        self.socket.close()
        while self._fds:
            os.close(self._fds.popleft())


class Port(_Receiver):
    """A blocking port, for the engine and for tests.

    `record_type` is the union of records that may arrive.
    """

    def send(self, record: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        """One LOCAL frame."""
        self.send_frame(FrameKind.LOCAL, codec.encode(record), fds)

    def send_frame(self, kind: FrameKind, payload: bytes | bytearray, fds: Sequence[int] = ()) -> None:
        """One frame of any kind. Raises: PortClosedError."""
        data = memoryview(encode_frame(kind, payload))
        try:
            if fds:
                sent = socket.send_fds(self.socket, [data], list(fds))
                data = data[sent:]
            if data:
                self.socket.sendall(data)
        except ConnectionError as error:
            raise PortClosedError(f"the {self.name} process is gone") from error

    def receive(self, timeout_s: float | None = None) -> Frame:
        """The next frame.

        Raises: TimeoutError: none within `timeout_s`. PortClosedError: the other end is gone.
        """
        while not self._frames:
            self.socket.settimeout(timeout_s)
            try:
                self._read()
            finally:
                self.socket.settimeout(None)
        return self._frames.popleft()

    def has_frame(self) -> bool:
        """Whether `receive` would return at once from what was read already."""
        return bool(self._frames)

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took."""
        self._close()

    def fileno(self) -> int:
        """For select and poll."""
        return self.socket.fileno()


class AsyncPort(_Receiver):
    """A port for asyncio: frames go to a callback, in the order they came, from the loop's own thread.

    `on_closed` is called once when the other end is gone.
    """

    def __init__(
        self,
        sock: socket.socket,
        record_type: Any,
        name: str,
        *,
        on_frame: Callable[[Frame], None],
        on_closed: Callable[[], None],
    ) -> None:
        super().__init__(sock, record_type, name)
        sock.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self._drained = asyncio.Event()
        self._drained.set()
        self._paused = False
        self.closed = False
        self._loop.add_reader(sock.fileno(), self._readable)

    def send(self, record: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        """One LOCAL frame, sent now if the socket takes it, else as soon as it does. Never blocks."""
        self.send_frame(FrameKind.LOCAL, codec.encode(record), fds)

    def send_frame(self, kind: FrameKind, payload: bytes | bytearray, fds: Sequence[int] = ()) -> None:
        """One frame of any kind. The descriptors are duplicated if they have to wait."""
        if self.closed:
            raise PortClosedError(f"the {self.name} process is gone")
        waiting = [os.dup(fd) for fd in fds] if self._out else list(fds)
        self._out.append((memoryview(encode_frame(kind, payload)), waiting))
        if len(self._out) == 1:
            self._flush(owned=False)

    async def drain(self) -> None:
        """Wait until everything is in the kernel's hands."""
        await self._drained.wait()

    def pause(self) -> None:
        """Read no more until `resume`: back-pressure towards the other process."""
        if not self._paused and not self.closed:
            self._paused = True
            self._loop.remove_reader(self.socket.fileno())

    def resume(self) -> None:
        """Undo `pause`; frames that were read already come first."""
        if self._paused and not self.closed:
            self._paused = False
            self._loop.add_reader(self.socket.fileno(), self._readable)
            self._loop.call_soon(self._dispatch)

    def close(self) -> None:
        """Close without calling `on_closed`."""
        if not self.closed:
            self.closed = True
            self._loop.remove_reader(self.socket.fileno())
            self._loop.remove_writer(self.socket.fileno())
            # Everything that waits here waits with descriptors of its own.
            self._drop_unsent()
            self._close()

    def _readable(self) -> None:
        try:
            self._read()
        except PortClosedError:
            self._dispatch()
            if not self._paused:  # else `resume` looks again: what is left is to be taken first
                self._lost()
            return
        self._dispatch()

    def _dispatch(self) -> None:
        while self._frames and not self._paused and not self.closed:
            self._on_frame(self._frames.popleft())

    def _lost(self) -> None:
        if not self.closed:
            self.close()
            self._on_closed()

    def _flush(self, *, owned: bool) -> None:
        while self._out:
            data, fds = self._out[0]
            try:
                sent = socket.send_fds(self.socket, [data], fds) if fds else self.socket.send(data)
            except (BlockingIOError, InterruptedError):
                if fds and not owned:
                    self._out[0] = (data, [os.dup(fd) for fd in fds])
                self._drained.clear()
                self._loop.add_writer(self.socket.fileno(), self._writable)
                return
            except OSError:
                # The reader sees the end of the stream as well, and reports it once.
                if not owned:
                    self._out.popleft()
                self._drop_unsent()
                break
            if owned:
                _close_all(fds)
            owned = True
            if sent < len(data):
                self._out[0] = (data[sent:], [])
            else:
                self._out.popleft()
        self._loop.remove_writer(self.socket.fileno())
        self._drained.set()

    def _writable(self) -> None:
        self._flush(owned=True)

    def _drop_unsent(self) -> None:
        while self._out:
            _close_all(self._out.popleft()[1])
        self._drained.set()


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
