"""Frames: one byte of kind, four of payload length (big-endian), the payload.

The same framing carries control messages, the data link and the sockets between the processes of one agent.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from protocol.errors import LocalProtocolError, RemoteProtocolError

HEADER = struct.Struct(">BI")
# A page batch is 1 MiB and its table; a section of an engine is bounded by the codec at 64 MiB.
MAX_PAYLOAD_BYTES = (64 << 20) + (1 << 16)
SHOWN_BYTES = 64  # Of what is not a frame, in the error: one line of text.


class FrameKind(enum.IntEnum):
    """Who a frame is for."""

    CONTROL = 1  # coordinator and agent: messages.Request, Reply, Event
    AGENT = 2  # agent to agent over the data link: link_messages.LinkMessage
    SECTION = 3  # engine to engine: one section, not looked into on the way
    PAGES = 4  # stream to stream: pages.py
    ROUND_END = 5  # stream to stream: everything before it is to be applied, then answered by ROUND_ACK
    ROUND_ACK = 6
    PACKET = 7  # stream to stream: one captured Ethernet frame, virtio header first
    LOCAL = 8  # between the processes of one agent
    PING = 9
    PONG = 10


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame, whole."""

    kind: FrameKind
    payload: bytes


def encode_frame(kind: FrameKind, payload: bytes | bytearray | memoryview) -> bytes:
    """Header and payload in one piece."""
    return frame_header(kind, len(payload)) + payload


def frame_header(kind: FrameKind, payload_bytes: int) -> bytes:
    """The header alone, for a payload that is written in parts (writev) and never put together.

    Raises: LocalProtocolError: the payload would be over the limit.
    """
    if payload_bytes > MAX_PAYLOAD_BYTES:
        raise LocalProtocolError(f"a {kind.name} frame of {payload_bytes} bytes is over {MAX_PAYLOAD_BYTES}")
    return HEADER.pack(kind, payload_bytes)


class FrameDecoder:
    """Cuts a byte stream into frames; never holds more than one frame beyond what was fed."""

    def __init__(self, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> None:
        self._buffer = bytearray()
        self._max_payload_bytes = max_payload_bytes

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Take bytes in, give the frames that are complete now. Nothing is taken before the first frame is asked for.

        Raises: RemoteProtocolError: an unknown kind or a payload over the limit, after the good frames before it; the
        decoder is of no use then.
        """
        buffer = self._buffer
        buffer += data
        position = 0
        try:
            while len(buffer) - position >= HEADER.size:
                kind, size = HEADER.unpack_from(buffer, position)
                try:
                    known = FrameKind(kind)
                except ValueError as error:
                    # Most often a shell's or an sshd's text, when the agent is started as a command.
                    seen = bytes(buffer[position : position + SHOWN_BYTES])
                    raise RemoteProtocolError(f"unknown frame kind {kind}; the bytes there: {seen!r}") from error
                if size > self._max_payload_bytes:
                    raise RemoteProtocolError(f"a {known.name} frame of {size} bytes is over {self._max_payload_bytes}")
                end = position + HEADER.size + size
                if len(buffer) < end:
                    break
                with memoryview(buffer) as view:
                    payload = bytes(view[position + HEADER.size : end])
                position = end
                yield Frame(known, payload)
        finally:
            del buffer[:position]

    @property
    def pending_bytes(self) -> int:
        """Bytes of a frame that is not complete yet: not 0 at the end of the stream means it was cut."""
        return len(self._buffer)
