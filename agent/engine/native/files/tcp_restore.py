"""The target's half of tcp.py: a connection made in repair mode, and how it goes live at the commit."""

from __future__ import annotations

import os
import socket
import struct
import time

from agent.engine.base import RepairedSocket
from agent.engine.native.files import tcp
from agent.engine.native.files.base import MadeAhead, Workshop, set_flags
from agent.engine.native.files.fin import send_fin
from agent.engine.native.files.socket_options import (
    SO_SNDBUFFORCE,
    Address,
    bind,
    read_buffers,
    set_buffers,
    set_options,
    set_reuse,
)
from agent.engine.native.files.tcp import TcpConnection
from agent.kernel.pidfd import pidfd_getfd, pidfd_open
from protocol.errors import KernelError

_TCP = socket.IPPROTO_TCP
_SO = socket.SOL_SOCKET
_SEQUENCES = 1 << 32
# Pieces small enough for one buffer of the kernel: a larger one may fail where memory is in pieces.
_PIECE_BYTES = 65536
_FIN_TIMEOUT_S = 0.5


def restore(record: TcpConnection, workshop: Workshop) -> int:
    """The connection, still in repair mode, in the thread's network namespace. Raises: KernelError."""
    ahead = workshop.prepared_sockets.pop(record.id, None)
    if ahead is not None and (ahead.family, ahead.local, ahead.options) != (
        record.family,
        record.local,
        record.options,
    ):
        ahead.sock.close()
        ahead = None
    with make(record) if ahead is None else ahead.sock as sock:
        fill(sock, record)
        return sock.detach()


def make_ahead(record: TcpConnection) -> MadeAhead:
    """For `prepare_restore`."""
    return MadeAhead(sock=make(record), family=record.family, local=record.local, options=record.options)


def make(record: TcpConnection) -> socket.socket:
    """The part that needs nothing of the freeze: a socket in repair mode, options set, bound."""
    sock = socket.socket(record.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, _TCP)
    try:
        # Binds beside listener and siblings, and connects without a handshake.
        sock.setsockopt(_TCP, tcp.TCP_REPAIR, tcp.REPAIR_ON)
        set_options(sock, record.options, but_reuse=True)
        bind(sock, record.local)
        # Not 'forced' as repair mode made it: what it is now is what it will be after.
        set_reuse(sock, record.options)
    except BaseException:
        sock.close()
        raise
    return sock


def fill(sock: socket.socket, record: TcpConnection) -> None:
    """Sequence numbers, queues, window; the interface must be up. Still in repair mode after. Raises: KernelError."""
    setsockopt = sock.setsockopt
    sent = record.sent
    if record.fin_went:
        # The FIN comes behind all data: it goes as sent and is sent again when nobody acknowledges it.
        sent += record.unsent
    set_buffers(sock, record.buffers, at_least_send=len(sent), at_least_receive=len(record.received))
    try:
        setsockopt(_TCP, tcp.TCP_REPAIR_QUEUE, tcp.RECV_QUEUE)
        setsockopt(_TCP, tcp.TCP_QUEUE_SEQ, _sequence(record.receive_next - len(record.received)))
        setsockopt(_TCP, tcp.TCP_REPAIR_QUEUE, tcp.SEND_QUEUE)
        setsockopt(_TCP, tcp.TCP_QUEUE_SEQ, _sequence(record.write_next - len(record.sent) - len(record.unsent)))
        sock.connect(record.peer.for_call(record.family))
        setsockopt(_TCP, tcp.TCP_REPAIR_OPTIONS, tcp.pack_repair_options(record))
        if record.negotiated & tcp.TCPI_OPT_TIMESTAMPS:
            setsockopt(_TCP, tcp.TCP_TIMESTAMP, _sequence(record.timestamp))
        if record.received:
            setsockopt(_TCP, tcp.TCP_REPAIR_QUEUE, tcp.RECV_QUEUE)
            _put(sock, record.received)
        if sent or record.fin_went:
            setsockopt(_TCP, tcp.TCP_REPAIR_QUEUE, tcp.SEND_QUEUE)
            _put(sock, sent)
            if record.fin_went and not record.fin_came:
                sock.shutdown(socket.SHUT_WR)
        setsockopt(_TCP, tcp.TCP_REPAIR_QUEUE, tcp.NO_QUEUE)
        setsockopt(_TCP, tcp.TCP_REPAIR_WINDOW, _clamped_window(record))
    except OSError as error:
        raise KernelError(
            f"TCP repair of {record.local.host}:{record.local.port} - {record.peer.host}:{record.peer.port}",
            error.errno or 0,
            error.strerror or "",
        ) from error
    if record.fin_came:
        _receive_fin(sock, record)
    if len(sent) or len(record.received):
        set_buffers(sock, record.buffers)
    set_flags(sock.fileno(), record.flags)


def _sequence(number: int) -> bytes:
    return struct.pack("I", number % _SEQUENCES)


def _put(sock: socket.socket, data: bytes) -> None:
    """Into the queue chosen by TCP_REPAIR_QUEUE."""
    view = memoryview(data)
    while view:
        view = view[sock.send(view[:_PIECE_BYTES]) :]


def _clamped_window(record: TcpConnection) -> bytes:
    """The window as it was before a FIN came: the kernel refuses one that begins behind what was received."""
    if not record.fin_came:
        return record.window
    wl1, send_window, max_window, receive_window, window_update = struct.unpack("5I", record.window)
    if _is_after(window_update, record.receive_next):
        window_update = record.receive_next
    if _is_after(wl1, record.receive_next):
        wl1 = record.receive_next
    return struct.pack("5I", wl1, send_window, max_window, receive_window, window_update)


def _is_after(one: int, other: int) -> bool:
    return 0 < (one - other) % _SEQUENCES < _SEQUENCES // 2


def _receive_fin(sock: socket.socket, record: TcpConnection) -> None:
    """Let the peer's FIN come again, then shut our side if it was shut. Raises: KernelError: it did not arrive."""
    acknowledged = (record.write_next - len(record.sent) - len(record.unsent)) % _SEQUENCES
    send_fin(record, acknowledged)
    deadline = time.monotonic() + _FIN_TIMEOUT_S
    while tcp.read_state(sock) not in tcp.FIN_CAME:
        if time.monotonic() > deadline:
            raise KernelError("raw FIN", 0, f"the FIN of {record.peer.host} did not arrive", hint="is lo up?")
    if record.fin_went:
        sock.setsockopt(_TCP, tcp.TCP_REPAIR_QUEUE, tcp.SEND_QUEUE)
        sock.shutdown(socket.SHUT_WR)
        sock.setsockopt(_TCP, tcp.TCP_REPAIR_QUEUE, tcp.NO_QUEUE)


def connection_key(local: Address, peer: Address) -> str:
    """How ReleasePackets names a connection: by the addresses on the wire."""
    return f"{local.plain_host} {local.port} {peer.plain_host} {peer.port}"


def activate(repaired: RepairedSocket) -> None:
    """Let a connection go live: end repair mode with a window probe, queue what had not left the source.

    Needs no engine; idempotent: a socket that is live already is left alone.
    Raises: TaskGoneError: the process is gone. KernelError.
    """
    pidfd = pidfd_open(repaired.pid)
    try:
        fd = pidfd_getfd(pidfd, repaired.fd)
    finally:
        os.close(pidfd)
    with socket.socket(fileno=fd) as sock:
        if tcp.leave_repair(sock, tcp.REPAIR_OFF) and repaired.unsent:
            _send_all(sock, repaired.unsent)


def _send_all(sock: socket.socket, data: bytes) -> None:
    """Queue everything without waiting: it fitted on the source, but this kernel may count it otherwise."""
    buffers = read_buffers(sock)
    view = memoryview(data)
    grown = buffers.send_bytes
    while view:
        try:
            view = view[sock.send(view, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            grown *= 2
            sock.setsockopt(_SO, SO_SNDBUFFORCE, grown)
        except OSError as error:
            raise KernelError("send(unsent data)", error.errno or 0, error.strerror or "") from error
    if grown != buffers.send_bytes:
        set_buffers(sock, buffers)


def leave_repair_everywhere(pid: int) -> int:
    """Take every TCP socket of a process out of repair mode, without a word on the wire; how many were in it.

    For the agent after its engine died: the program's send() would fail. Idempotent.
    Raises: TaskGoneError: the process is gone.
    """
    pidfd = pidfd_open(pid)
    count = 0
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            count += _leave_if_tcp(pid, pidfd, int(number))
    finally:
        os.close(pidfd)
    return count


def _leave_if_tcp(pid: int, pidfd: int, number: int) -> bool:
    try:
        if not os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:["):
            return False
        fd = pidfd_getfd(pidfd, number)
    except (FileNotFoundError, KernelError):
        return False  # closed meanwhile
    with socket.socket(fileno=fd) as sock:
        is_tcp = sock.family in {socket.AF_INET, socket.AF_INET6} and sock.proto == _TCP
        return is_tcp and tcp.leave_repair(sock, tcp.REPAIR_OFF_NO_WP)
