"""The control conversation of a coordinator and an agent, as a machine that does no I/O and reads no clock.

Bytes go in by `receive_data`, events come out of `next_event`; `send` gives the bytes of a message and
`data_to_send` those of automatic answers. Whoever owns the socket moves the bytes and looks at the clock:

    connection.receive_data(data)             # b'' at the end of the stream
    transport.write(connection.data_to_send())
    while (event := connection.next_event()) is not NEED_DATA: ...
    deadline = connection.next_deadline(now)  # call it again after every receive_data

Rules, enforced on what is sent as on what is received: a coordinator sends Request only and an agent Reply and
Notice only; the first request is Hello, and nothing else is asked or told before it was answered by Welcome;
request numbers grow; a reply answers one pending request with the type that `messages.ANSWERS` names, or Failure.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, assert_never

from protocol import codec, messages
from protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from protocol.framing import Frame, FrameDecoder, FrameKind, encode_frame

MAX_PENDING_REQUESTS = 64  # A coordinator has one request a phase in flight, and a few that only read.
MAX_CONTROL_BYTES = 8 << 20  # A report that lists 20,000 files is about 4 MiB; pages and sections go elsewhere.
MAX_QUEUED_PONGS = 64  # Answers that nobody takes must not grow: such a peer does nothing but ping.
IDLE_S = 10.0  # Nothing heard for so long: PING. A laptop on a train loses packets for a few seconds.
MAX_UNANSWERED_PINGS = 3

_PING = struct.Struct(">Q")


class Role(enum.Enum):
    """Which end of the conversation this is."""

    COORDINATOR = "coordinator"
    AGENT = "agent"


class NeedData(enum.Enum):
    """Type of NEED_DATA."""

    NEED_DATA = "need-data"


NEED_DATA: Final = NeedData.NEED_DATA


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionClosed:
    """The peer ended the stream between two frames; nothing follows.

    `unanswered` are the numbers of the requests whose reply had not crossed.
    """

    unanswered: tuple[int, ...]


ConnectionEvent = messages.Request | messages.Reply | messages.Notice | ConnectionClosed


class Connection:
    """One end of a control connection.

    After a remote violation, or a local one against the order of the conversation, the connection is of no more
    use: `usable` is False, `next_event` raises the same error again and `send` refuses. A message that does not fit
    its own schema is refused by `send` and changes nothing, so that a Failure can be sent in its place.
    """

    def __init__(self, role: Role) -> None:
        self._role = role
        self._decoder = FrameDecoder(MAX_CONTROL_BYTES)
        self._inbox: deque[bytes] = deque()
        self._outbox = bytearray()
        self._inbox_error: RemoteProtocolError | None = None  # behind the good frames of the inbox
        self._error: ProtocolError | None = None
        self._at_eof = False
        self._closed = False
        self._last_number = -1
        self._pending: dict[int, type[messages.Message]] = {}
        self._offered_versions: list[int] = []
        self._version: int | None = None
        self._heard = False
        self._quiet_since: float | None = None
        self._unanswered_pings = 0
        self._pings_sent = 0
        self._pongs_seen = 0

    @property
    def role(self) -> Role:
        """Which end this is."""
        return self._role

    @property
    def version(self) -> int | None:
        """The protocol version that Welcome named; None before."""
        return self._version

    @property
    def usable(self) -> bool:
        """Whether `send` may still be called: no error, and the peer's end of the stream was not met."""
        return self._error is None and self._inbox_error is None and not self._at_eof

    @property
    def pending_replies(self) -> Mapping[int, type[messages.Message]]:
        """Requests without a reply, by number: a coordinator waits for them, an agent owes them."""
        return MappingProxyType(self._pending)

    @property
    def next_number(self) -> int:
        """The number for the next Request."""
        return self._last_number + 1

    # ------------------------------------------------------------ bytes in, events out

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the peer; b'' is the end of its stream. What is wrong with them, `next_event` says.

        Raises: LocalProtocolError: bytes after the end of the stream.
        """
        if self._at_eof:
            if data:
                raise LocalProtocolError("bytes were received after the end of the stream")
            return
        if not self.usable:
            return
        if not data:
            self._at_eof = True
            if self._decoder.pending_bytes:
                cut = self._decoder.pending_bytes
                self._inbox_error = RemoteProtocolError(f"the stream was cut inside a frame, {cut} bytes into it")
            return
        self._heard = True
        try:
            for frame in self._decoder.feed(data):
                self._take_frame(frame)
        except RemoteProtocolError as error:
            self._inbox_error = error

    def data_to_send(self) -> bytes:
        """Bytes of automatic answers (PONG) that wait to be written; each is given once."""
        data = bytes(self._outbox)
        self._outbox.clear()
        return data

    def next_event(self) -> ConnectionEvent | Literal[NeedData.NEED_DATA]:
        """The next message of the peer, ConnectionClosed (again and again) at its end, else NEED_DATA.

        Raises: RemoteProtocolError: the peer broke a rule; the messages before that were given. ProtocolError: the
        connection was of no use already, by the same error.
        """
        if self._error is not None:
            raise self._error
        if self._inbox:
            try:
                return self._take_message(codec.decode(self._inbox.popleft(), messages.Control))
            except RemoteProtocolError as error:
                self._fail(error)
                raise
        if self._inbox_error is not None:
            self._fail(self._inbox_error)
            raise self._inbox_error
        if self._at_eof:
            self._closed = True
            return ConnectionClosed(unanswered=tuple(self._pending))
        return NEED_DATA

    # ------------------------------------------------------------ messages out

    def send(self, message: messages.Control) -> bytes:
        """The bytes of `message`, which counts as sent from now on.

        Raises: LocalProtocolError: the message may not be sent now, or does not fit its own schema.
        """
        if not self.usable:
            reason = self._error or self._inbox_error or "the peer has closed it"
            raise LocalProtocolError(f"{_name(message)} on a connection that is of no use: {reason}")
        payload = codec.encode(message)
        if len(payload) > MAX_CONTROL_BYTES:
            raise LocalProtocolError(f"{_name(message)} of {len(payload)} bytes is over {MAX_CONTROL_BYTES}")
        try:
            # Structs are not validated when they are made; the peer would drop the connection without a reason.
            codec.decode(payload, messages.Control)
        except RemoteProtocolError as error:
            raise LocalProtocolError(f"{_name(message)} does not fit its own schema: {error}") from error
        broken = self._broken_rule(message, self._role)
        if broken is not None:
            failure = LocalProtocolError(f"{_name(message)} may not be sent: {broken}")
            self._fail(failure)
            raise failure
        self._follow(message)
        return encode_frame(FrameKind.CONTROL, payload)

    # ------------------------------------------------------------ keepalive

    def next_deadline(self, now: float) -> float | None:
        """When `handle_timeout` is due, in seconds on the clock of `now`; None: never.

        `now` is also taken as the time of all that was received since the last call.
        """
        if not self.usable:
            return None
        if self._heard or self._quiet_since is None:
            self._heard = False
            self._quiet_since = now
            self._unanswered_pings = 0
        return self._quiet_since + IDLE_S

    def handle_timeout(self, now: float) -> bytes:
        """The PING to write if the link has been quiet for IDLE_S, else b''.

        Raises: RemoteProtocolError: MAX_UNANSWERED_PINGS pings, an interval apart, brought no sign of life.
        """
        deadline = self.next_deadline(now)
        if deadline is None or now < deadline:
            return b""
        if self._unanswered_pings == MAX_UNANSWERED_PINGS:
            silence_s = IDLE_S * (MAX_UNANSWERED_PINGS + 1)
            peer = Role.AGENT if self._role is Role.COORDINATOR else Role.COORDINATOR
            lost = RemoteProtocolError(f"link lost: nothing from the {peer.value} for {silence_s:.0f} s")
            self._fail(lost)
            raise lost
        # From this ping on, not from the last sign of life: an own pause of a minute is not the peer's silence.
        self._quiet_since = now
        self._unanswered_pings += 1
        self._pings_sent += 1
        return encode_frame(FrameKind.PING, _PING.pack(self._pings_sent))

    # ------------------------------------------------------------ inside

    def _fail(self, error: ProtocolError) -> None:
        self._error = error
        self._inbox.clear()
        self._outbox.clear()

    def _take_frame(self, frame: Frame) -> None:
        match frame.kind:
            case FrameKind.CONTROL:
                self._inbox.append(frame.payload)
            case FrameKind.PING:
                _ping_number(frame)
                pong = encode_frame(FrameKind.PONG, frame.payload)
                if len(self._outbox) >= MAX_QUEUED_PONGS * len(pong):
                    raise RemoteProtocolError(f"more than {MAX_QUEUED_PONGS} PING frames before one could be answered")
                self._outbox += pong
            case FrameKind.PONG:
                number = _ping_number(frame)
                if not self._pongs_seen < number <= self._pings_sent:
                    raise RemoteProtocolError(f"PONG {number} answers no PING: {self._pings_sent} were sent")
                self._pongs_seen = number
            case _:
                raise RemoteProtocolError(f"a {frame.kind.name} frame has no place on a control connection")

    def _take_message(self, message: messages.Control) -> messages.Control:
        peer = Role.AGENT if self._role is Role.COORDINATOR else Role.COORDINATOR
        broken = self._broken_rule(message, peer)
        if broken is not None:
            raise RemoteProtocolError(f"the {peer.value} sent {_name(message)}: {broken}")
        self._follow(message)
        return message

    def _broken_rule(self, message: messages.Control, sender: Role) -> str | None:
        """Which rule `sender` breaks by this message at this moment; None: none."""
        sent_by = Role.COORDINATOR if isinstance(message, messages.Request) else Role.AGENT
        if sent_by is not sender:
            return f"only the {sent_by.value} sends a {type(message).__name__}"
        match message:
            case messages.Request():
                return self._broken_request_rule(message)
            case messages.Reply():
                return self._broken_reply_rule(message)
            case messages.Notice():
                return "a Notice before Welcome" if self._version is None else None
        assert_never(message)

    def _broken_request_rule(self, request: messages.Request) -> str | None:
        is_first = self._last_number < 0
        if is_first != isinstance(request.body, messages.Hello):
            return "the first request, and only the first, is Hello"
        if not is_first and self._version is None:
            return "nothing is asked before Hello was answered by Welcome"
        if request.number <= self._last_number:
            return f"request number {request.number} does not follow {self._last_number}"
        if len(self._pending) >= MAX_PENDING_REQUESTS:
            return f"{MAX_PENDING_REQUESTS} requests wait for their replies already"
        return None

    def _broken_reply_rule(self, reply: messages.Reply) -> str | None:
        asked = self._pending.get(reply.number)
        if asked is None:
            return f"number {reply.number} is no pending request"
        wanted = messages.ANSWERS[asked]
        if not isinstance(reply.body, wanted | messages.Failure):
            return f"{asked.__name__} is answered by {wanted.__name__} or Failure"
        if isinstance(reply.body, messages.Welcome) and reply.body.version not in self._offered_versions:
            return f"version {reply.body.version} is not one of those offered, {self._offered_versions}"
        return None

    def _follow(self, message: messages.Control) -> None:
        """Take note of a message that keeps the rules."""
        match message:
            case messages.Request():
                self._last_number = message.number
                self._pending[message.number] = type(message.body)
                if isinstance(message.body, messages.Hello):
                    self._offered_versions = list(message.body.versions)
            case messages.Reply():
                del self._pending[message.number]
                if isinstance(message.body, messages.Welcome):
                    self._version = message.body.version
            case messages.Notice():
                pass
            case _:
                assert_never(message)


def _name(message: messages.Control) -> str:
    return f"{type(message).__name__}({type(message.body).__name__})"


def _ping_number(frame: Frame) -> int:
    if len(frame.payload) != _PING.size:
        raise RemoteProtocolError(f"{frame.kind.name} carries {_PING.size} bytes, not {len(frame.payload)}")
    (number,) = _PING.unpack(frame.payload)
    return int(number)
