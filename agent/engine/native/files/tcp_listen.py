"""Listening TCP sockets: address, backlog, options.

Does not survive: connections that nobody has accepted yet: the freeze waits for the queue to be empty.
"""

from __future__ import annotations

import socket
import struct

from agent.engine.native.files import tcp
from agent.engine.native.files.base import (
    ObjectRecord,
    OpenFile,
    PreparedSocket,
    Scope,
    TransientStateError,
    Workshop,
    set_flags,
    status_flags,
)
from agent.engine.native.files.socket_options import Address, Buffers, Option, bind, set_buffers, set_options
from protocol.errors import KernelError
from protocol.messages import Refusal

_QUEUE_OFFSET = 24  # of tcpi_unacked (waiting) and tcpi_sacked (backlog) in struct tcp_info, for a listener


class TcpListener(ObjectRecord, frozen=True, kw_only=True, tag="tcp-listener"):
    """One listening socket."""

    family: int
    local: Address
    backlog: int
    options: list[Option]
    buffers: Buffers


def matches(file: OpenFile, scope: Scope) -> bool:
    """A TCP socket in LISTEN."""
    return tcp.is_tcp(file, scope) and tcp.read_state(scope.hold_socket(file).sock) == tcp.State.LISTEN


def check(file: OpenFile, scope: Scope) -> list[Refusal]:
    """The extras of TCP sockets; what waits to be accepted now will be accepted by then."""
    return tcp.check_extras(file, scope)


prepare = tcp.prepare


def dump(file: OpenFile, scope: Scope, prepared: PreparedSocket) -> TcpListener:
    """Raises: TransientStateError: connections wait to be accepted."""
    info = prepared.held.sock.getsockopt(socket.IPPROTO_TCP, tcp.TCP_INFO, _QUEUE_OFFSET + 8)
    waiting, backlog = struct.unpack_from("II", info, _QUEUE_OFFSET)
    if waiting:
        raise TransientStateError(
            f"process {scope.container_pid}, fd {file.fd}: {waiting} connections to port {prepared.local.port} wait to "
            "be accepted"
        )
    return TcpListener(
        id=file.id,
        flags=status_flags(file.flags),
        family=prepared.held.family,
        local=prepared.local,
        backlog=backlog,
        options=prepared.options,
        buffers=prepared.buffers,
    )


def restore(record: TcpListener, workshop: Workshop) -> int:  # noqa: ARG001 - the interface of all kinds
    """Make, bind, listen, in the thread's network namespace. Raises: KernelError: the address is not there or taken."""
    with socket.socket(record.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, socket.IPPROTO_TCP) as sock:
        set_options(sock, record.options)
        set_buffers(sock, record.buffers)
        bind(sock, record.local)
        try:
            sock.listen(record.backlog)
        except OSError as error:
            raise KernelError(f"listen on port {record.local.port}", error.errno or 0, error.strerror or "") from error
        set_flags(sock.fileno(), record.flags)
        return sock.detach()
