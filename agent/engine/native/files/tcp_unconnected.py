"""TCP sockets without a connection: fresh, bound, connecting, or with one that is over or was cut by --tcp close.

Does not survive: the handshake of a connecting socket starts over; the addresses of a connection that is over; a
connection under --tcp close: the program sees it reset.
"""

from __future__ import annotations

import os
import select
import socket
import struct

from agent.engine.native.files.base import (
    ObjectRecord,
    OpenFile,
    PreparedSocket,
    Scope,
    Workshop,
    set_flags,
    status_flags,
)
from agent.engine.native.files.socket_options import Address, Buffers, Option, bind, set_buffers, set_options
from agent.kernel.procfs import read_proc
from agent.kernel.syscalls import os_failure
from protocol.errors import KernelError

_TCP = socket.IPPROTO_TCP
_SO = socket.SOL_SOCKET
_LONGEST_S = 2.0


class TcpClosed(ObjectRecord, frozen=True, kw_only=True, tag="tcp-closed"):
    """A socket that was never connected; perhaps bound, perhaps on its way to `connecting_to`."""

    family: int
    local: Address
    options: list[Option]
    buffers: Buffers
    connecting_to: Address | None = None


class TcpOver(ObjectRecord, frozen=True, kw_only=True, tag="tcp-over"):
    """A socket whose connection has ended: what it had received, then the end, or (`reset`) an error."""

    family: int
    options: list[Option]
    buffers: Buffers
    received: bytes = b""
    reset: bool = False


def is_over(sock: socket.socket) -> bool:
    """Whether a socket in CLOSE once was connected: an error waits, or reading does not say 'not connected'."""
    if has_error(sock):
        return True
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return False
    return True


def has_error(sock: socket.socket) -> bool:
    """Whether an error waits to be told; asking does not take it."""
    poller = select.poll()
    poller.register(sock, 0)
    events = poller.poll(0)
    return bool(events and events[0][1] & select.POLLERR)


def dump_closed(file: OpenFile, prepared: PreparedSocket, connecting_to: Address | None = None) -> TcpClosed:
    """A socket without a past."""
    return TcpClosed(
        id=file.id,
        flags=status_flags(file.flags),
        family=prepared.held.family,
        local=Address.of(prepared.held.sock.getsockname()),
        options=prepared.options,
        buffers=prepared.buffers,
        connecting_to=connecting_to,
    )


def dump_over(file: OpenFile, prepared: PreparedSocket, *, reset: bool) -> TcpOver:
    """A socket with nothing but a past. `reset`: whatever it was, the program is to see it reset."""
    sock = prepared.held.sock
    reset = reset or has_error(sock)
    received = b""
    if not reset:
        received = sock.recv(max(prepared.buffers.receive_bytes, 1 << 20), socket.MSG_PEEK | socket.MSG_DONTWAIT)
    return TcpOver(
        id=file.id,
        flags=status_flags(file.flags),
        family=prepared.held.family,
        options=prepared.options,
        buffers=prepared.buffers,
        received=received,
        reset=reset,
    )


def find_peer(file: OpenFile, scope: Scope, family: int) -> Address:
    """Where a connecting socket connects to, which getpeername does not tell.   Source: proc_pid_net(5), tcp."""
    table = "tcp" if family == socket.AF_INET else "tcp6"
    for line in read_proc(f"/proc/{scope.pid}/net/{table}").split(b"\n")[1:]:
        words = line.split()
        if len(words) > 9 and int(words[9]) == file.inode:
            host, port = words[2].split(b":")
            return Address(host=_host_of(host.decode(), family), port=int(port, 16))
    raise KernelError(f"/proc/PID/net/{table}", 0, f"socket {file.inode} is not in it any more")


def _host_of(text: str, family: int) -> str:
    """Words of 32 bits in the machine's order, as hexadecimal."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    return socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))


def restore_closed(record: TcpClosed, workshop: Workshop) -> int:  # noqa: ARG001 - the interface of all kinds
    """A fresh socket with its options, bound if it was, connecting again if the program does not wait for it."""
    with socket.socket(record.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, _TCP) as sock:
        set_options(sock, record.options)
        set_buffers(sock, record.buffers)
        if record.local.port:
            bind(sock, record.local)
        set_flags(sock.fileno(), record.flags)
        # A program that waits in connect(2) makes the call again by itself.
        if record.connecting_to is not None and record.flags & os.O_NONBLOCK:
            try:
                sock.connect(record.connecting_to.for_call(record.family))
            except BlockingIOError:
                pass
            except OSError as error:
                raise os_failure(f"connect({record.connecting_to.host})", error) from error
        return sock.detach()


def restore_over(record: TcpOver, workshop: Workshop) -> int:  # noqa: ARG001 - the interface of all kinds
    """The same end, come about over the loopback interface of the container. Raises: KernelError: lo is down."""
    host = "127.0.0.1" if record.family == socket.AF_INET else "::1"
    try:
        with socket.socket(record.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, _TCP) as listener:
            listener.bind((host, 0))
            listener.listen(1)
            sock = socket.socket(record.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, _TCP)
            try:
                sock.settimeout(_LONGEST_S)
                sock.connect(listener.getsockname())
                peer, _ = listener.accept()
                with peer:
                    _end(sock, peer, record)
                sock.setblocking(True)
                set_options(sock, record.options)
                set_buffers(sock, record.buffers)
                set_flags(sock.fileno(), record.flags)
                return sock.detach()
            except BaseException:
                sock.close()
                raise
    except OSError as error:
        raise os_failure(f"a connection over {host} in the container", error) from error


def _end(sock: socket.socket, peer: socket.socket, record: TcpOver) -> None:
    if record.reset:
        peer.setsockopt(_SO, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        return
    set_buffers(sock, record.buffers, at_least_receive=len(record.received))
    set_buffers(peer, record.buffers, at_least_send=len(record.received))
    peer.settimeout(_LONGEST_S)
    peer.sendall(record.received)
    # Our end first, so that it goes from FIN_WAIT2 to CLOSE and not to CLOSE_WAIT.
    sock.shutdown(socket.SHUT_WR)
    peer.recv(1)
    peer.close()
