"""The SSH connection between two agents' streams: frames over one session of the subsystem 'migrate-data'.

The target listens for one client key on one port, and takes one session, once; the source pins the host key.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import Any

import asyncssh

from agent.engine import base
from protocol.errors import PeerError, RemoteProtocolError
from protocol.framing import Frame, FrameDecoder, FrameKind, frame_header

SUBSYSTEM = "migrate-data"
_USER = "migrate"
# Bounds what is unsent in this process (asyncssh hands everything within the window to the socket's buffer).
_WINDOW_BYTES = 8 << 20
# With malloc kept from unmapping (main.py) half a MiB takes a fifth less CPU than 128 KiB, on both sides.
_MAX_PACKET_BYTES = 512 << 10
# Beyond the window; a frame of pages is 1 MiB.
_HIGH_WATER_BYTES = 1 << 20
_LOGIN_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 10.0
_MAX_UNAUTHENTICATED = 8
_CLOSE_TIMEOUT_S = 1.0
# Parts below this are put into one packet with their header.
_SMALL_BYTES = 256 << 10

_COMMON_OPTIONS: dict[str, Any] = {
    "encryption_algs": ["aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com"],
    "compression_algs": ["none"],
    "keepalive_interval": 5,
    "keepalive_count_max": 3,
    "login_timeout": _LOGIN_TIMEOUT_S,
    # AES may encrypt 2**32 blocks with one key (RFC 4344, 3.2), which is 64 GiB; the default of 1 GiB brings a
    # pause in the middle of a freeze.
    "rekey_bytes": 32 << 30,
    "rekey_seconds": 8 * 3600,
    "x509_trusted_certs": None,
    "gss_host": None,
    "config": None,
}


class Link(asyncssh.SSHClientSession[bytes], asyncssh.SSHServerSession[bytes]):
    """Frames in and out. `on_lost` is called once, with what happened, unless we closed it ourselves."""

    def __init__(self, on_frame: Callable[[Frame], None], on_lost: Callable[[str], None]) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._decoder = FrameDecoder()
        # Anything but None from connection_made on; a session that was refused never gets there.
        self._channel: Any = None
        self._socket: socket.socket
        self._writable = asyncio.Event()
        self._writable.set()
        self._ended = asyncio.Event()
        self._is_closing = False
        self.connection: asyncssh.SSHClientConnection | asyncssh.SSHServerConnection
        self.peer = ""

    # ------------------------------------------------------------ for the stream

    def send(self, kind: FrameKind, *parts: bytes | bytearray | memoryview) -> int:
        """Send one frame; gives its size on the link, bytes. What the socket does not take is buffered: `drain`."""
        payload_bytes = sum(map(len, parts))
        header = frame_header(kind, payload_bytes)
        if self._channel is None or self._is_closing or self._ended.is_set():
            return 0
        try:
            # asyncssh puts an empty packet before each: in one segment they wake the other side once.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
            if payload_bytes <= _SMALL_BYTES:
                self._channel.write(b"".join((header, *parts)))
            else:
                self._channel.write(b"".join((header, *parts[:-1])))
                self._channel.write(parts[-1])
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        except OSError:
            # The end of the connection is reported by connection_lost.
            return 0
        return len(header) + payload_bytes

    def send_many(self, kind: FrameKind, payloads: Sequence[bytes]) -> None:
        """Small frames in one packet, which costs little more than one of them."""
        if self._channel is None or self._is_closing or self._ended.is_set() or not payloads:
            return
        with contextlib.suppress(OSError):  # the end of the connection is reported by connection_lost
            self._channel.write(b"".join(part for data in payloads for part in (frame_header(kind, len(data)), data)))

    async def drain(self) -> None:
        """Wait until there is room, and let the event loop do its other work."""
        await asyncio.sleep(0)
        await self._writable.wait()

    def pause_reading(self) -> None:
        self._channel.pause_reading()

    def resume_reading(self) -> None:
        self._channel.resume_reading()

    def abort(self) -> None:
        """Close at once; what is unsent is lost."""
        self._is_closing = True
        if self._channel is not None:
            self.connection.abort()

    async def close(self) -> None:
        """Send what is unsent, bounded in time, and close."""
        self._is_closing = True
        if self._channel is None:
            return
        self._channel.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), _CLOSE_TIMEOUT_S)
        self.connection.abort()

    # ------------------------------------------------------------ called by asyncssh

    def connection_made(self, chan: Any) -> None:
        self._channel = chan
        self.connection = chan.get_connection()
        self._socket = self.connection.get_extra_info("socket")
        chan.set_write_buffer_limits(high=_HIGH_WATER_BYTES, low=_HIGH_WATER_BYTES // 2)
        address = chan.get_extra_info("peername")
        self.peer = f"{address[0]}:{address[1]}"

    def subsystem_requested(self, subsystem: str) -> bool:
        return subsystem == SUBSYSTEM

    def data_received(self, data: bytes, datatype: int | None) -> None:  # noqa: ARG002 - asyncssh names it
        if self._is_over():
            return
        try:
            for frame in self._decoder.feed(data):
                self._on_frame(frame)
                if self._is_over():
                    return
        except RemoteProtocolError as error:
            self._lose(f"{self.peer} does not keep to the protocol: {error}")
            self.abort()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended.set()
        self._writable.set()
        cut = f", {self._decoder.pending_bytes} bytes into a frame" if self._decoder.pending_bytes else ""
        self._lose(f"the data link to {self.peer} was lost: {exc or 'closed by the other side'}{cut}")

    def _is_over(self) -> bool:
        return self._is_closing

    def _lose(self, text: str) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._on_lost(text)


# ---------------------------------------------------------------- target


class DataListener:
    """Listens for the one source of one migration.

    `make_link` is called for the first session of the first connection that authenticates; nothing else is served.
    """

    def __init__(self, make_link: Callable[[], Link], peer_address: str) -> None:
        self._make_link = make_link
        self._peer = ipaddress.ip_address(peer_address) if peer_address else None
        self._acceptor: asyncssh.SSHAcceptor | None = None
        self._pending: set[asyncssh.SSHServerConnection] = set()
        self._chosen: asyncssh.SSHServerConnection | None = None
        self._has_session = False
        self.authenticated = asyncio.Event()

    async def start(self, address: str, ports: Sequence[int], client_public_key: str) -> tuple[int, str]:
        """Listen on the first free one of `ports`; gives it, and the host key made for this migration.

        Raises: PeerError: none is free. RemoteProtocolError: not a public key.
        """
        try:
            keys = asyncssh.import_authorized_keys(client_public_key)
        except ValueError as error:
            raise RemoteProtocolError(f"the source's client key cannot be read: {error}") from error
        host_key = asyncssh.generate_private_key("ssh-ed25519")
        sock = _bind_first(address, ports)
        self._acceptor = await asyncssh.listen(
            sock=sock, server_factory=lambda: _Server(self), server_host_keys=[host_key], authorized_client_keys=keys,
            password_auth=False, kbdint_auth=False, host_based_auth=False, public_key_auth=True, allow_pty=False,
            agent_forwarding=False, x11_forwarding=False, encoding=None, line_editor=False, window=_WINDOW_BYTES,
            max_pktsize=_MAX_PACKET_BYTES, **_COMMON_OPTIONS,
        )  # fmt: skip
        return sock.getsockname()[1], host_key.export_public_key("openssh").decode("ascii").strip()

    def close(self) -> None:
        """Listen no more; the chosen connection goes on."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        for connection in self._pending:
            connection.abort()
        self._pending.clear()

    def admit(self, connection: asyncssh.SSHServerConnection) -> None:
        address = ipaddress.ip_address(connection.get_extra_info("peername")[0].partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        is_stranger = self._peer is not None and self._peer not in {address, mapped}
        if is_stranger or self._chosen is not None or len(self._pending) >= _MAX_UNAUTHENTICATED:
            connection.abort()
        else:
            self._pending.add(connection)

    def forget(self, connection: asyncssh.SSHServerConnection) -> None:
        self._pending.discard(connection)

    def choose(self, connection: asyncssh.SSHServerConnection) -> None:
        self._pending.discard(connection)
        if self._chosen is not None:
            connection.abort()
            return
        self._chosen = connection
        self.authenticated.set()
        self.close()

    def open_session(self, connection: asyncssh.SSHServerConnection) -> Link | bool:
        if connection is not self._chosen or self._has_session:
            return False
        self._has_session = True
        return self._make_link()


class _Server(asyncssh.SSHServer):
    """One connection that came in. Everything that is not overridden here is refused by asyncssh."""

    def __init__(self, listener: DataListener) -> None:
        self._listener = listener
        self._connection: asyncssh.SSHServerConnection

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._listener.admit(conn)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncssh names it
        self._listener.forget(self._connection)

    def begin_auth(self, username: str) -> bool:  # noqa: ARG002 - asyncssh names it
        return True

    def auth_completed(self) -> None:
        self._listener.choose(self._connection)

    def session_requested(self) -> Any:
        return self._listener.open_session(self._connection)


def _bind_first(address: str, ports: Sequence[int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    last: OSError | None = None
    for port in ports:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            sock.listen(_MAX_UNAUTHENTICATED)
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            last = error
        else:
            return sock
    span = f"{ports[0]}-{ports[-1]}" if ports else "(none given)"
    raise PeerError(
        f"no port of {span} on {address} is free for the data link: {last}", code="no-data-port",
        hint="widen data_ports in agent.toml",
    )  # fmt: skip


# ---------------------------------------------------------------- source


def make_client_key() -> asyncssh.SSHKey:
    """The client key of one migration; it never leaves this process."""
    return asyncssh.generate_private_key("ssh-ed25519")


async def connect(request: base.StreamConnect, key: asyncssh.SSHKey, make_link: Callable[[], Link]) -> Link:
    """Connect to the target's listener. Raises: PeerError: with the reason."""
    where = f"{request.address}:{request.port}"
    try:
        host_key = asyncssh.import_public_key(request.host_key)
        connection = await asyncssh.connect(
            request.address, request.port, username=_USER, client_keys=[key], known_hosts=([host_key], [], []),
            server_host_key_algs=["ssh-ed25519"], preferred_auth=["publickey"], agent_path=None,
            agent_forwarding=False, connect_timeout=_CONNECT_TIMEOUT_S, **_COMMON_OPTIONS,
        )  # fmt: skip
    except asyncssh.HostKeyNotVerifiable as error:
        raise PeerError(f"{where} has another host key than the target made for this migration", code="host-key",
                        hint="something between the hosts answers in its place") from error  # fmt: skip
    except asyncssh.PermissionDenied as error:
        raise PeerError(f"{where} does not take the key of this migration", code="auth-refused") from error
    except (OSError, asyncssh.Error, ValueError) as error:
        raise PeerError(f"the data link to {where} cannot be opened: {error or type(error).__name__}",
                        hint="data_ports of the target must be reachable from the source") from error  # fmt: skip
    try:
        link = make_link()
        await connection.create_session(
            lambda: link, subsystem=SUBSYSTEM, encoding=None, window=_WINDOW_BYTES, max_pktsize=_MAX_PACKET_BYTES,
        )  # fmt: skip
    except (OSError, asyncssh.Error) as error:
        connection.abort()
        raise PeerError(f"{where} refused the data session: {error}", code="session-refused") from error
    return link
