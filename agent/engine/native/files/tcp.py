"""TCP connections, by TCP_REPAIR: both queues, sequence numbers, window, timestamps, negotiated and set options.

The connection is dumped in repair mode and stays there: the source's copy dies without FIN or RST, the target's
leaves it at the commit. A FIN that came is given again through a raw socket, a FIN that went is sent again.

Does not survive: urgent data; ECN; TCP-MD5, TLS and MPTCP; socket filters;
congestion window and round-trip estimates start anew.
"""

from __future__ import annotations

import array
import enum
import fcntl
import socket
import struct
import termios

from agent.engine.native.files.base import (
    ObjectRecord,
    OpenFile,
    PreparedSocket,
    Scope,
    TransientStateError,
    status_flags,
)
from agent.engine.native.files.socket_options import (
    SO_PEEK_OFF,
    SO_REUSEADDR,
    Address,
    Buffers,
    Option,
    Template,
    has_filter,
    read_buffers,
    refresh_volatile,
)
from agent.engine.native.files.tcp_unconnected import (
    TcpClosed,
    TcpOver,
    dump_closed,
    dump_over,
    find_peer,
    is_over,
)
from protocol.errors import KernelError, UnsupportedError
from protocol.messages import Refusal

# linux/tcp.h
TCP_MAXSEG = 2
TCP_INFO = 11
TCP_REPAIR = 19
TCP_REPAIR_QUEUE = 20
TCP_QUEUE_SEQ = 21
TCP_REPAIR_OPTIONS = 22
TCP_TIMESTAMP = 24
TCP_REPAIR_WINDOW = 29
TCP_ULP = 31
REPAIR_ON = 1
REPAIR_OFF = 0
REPAIR_OFF_NO_WP = -1
NO_QUEUE = 0
RECV_QUEUE = 1
SEND_QUEUE = 2
TCPI_OPT_TIMESTAMPS = 1
TCPI_OPT_SACK = 2
TCPI_OPT_WSCALE = 4
WINDOW_BYTES = 20
# linux/sockios.h
SIOCOUTQNSD = 0x894B
IPPROTO_TCP = int(socket.IPPROTO_TCP)
FAMILIES = frozenset({int(socket.AF_INET), int(socket.AF_INET6)})
_TCP = IPPROTO_TCP
_SO = socket.SOL_SOCKET
_SEQUENCES = 1 << 32
_INFO_BYTES = 8  # state, ..., options, window scales


class State(enum.IntEnum):
    """net/tcp_states.h"""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11


FIN_CAME = frozenset({State.CLOSE_WAIT, State.LAST_ACK, State.CLOSING})
FIN_WENT = frozenset({State.FIN_WAIT1, State.FIN_WAIT2, State.LAST_ACK, State.CLOSING})
CONNECTED = FIN_CAME | FIN_WENT | {State.ESTABLISHED}


class TcpConnection(ObjectRecord, frozen=True, kw_only=True, tag="tcp-connection"):
    """One connection; sequence numbers are those behind the data of each queue, FINs not counted."""

    family: int
    local: Address
    peer: Address
    options: list[Option]
    buffers: Buffers
    fin_came: bool = False
    fin_went: bool = False
    mss: int
    send_scale: int
    receive_scale: int
    negotiated: int  # tcpi_options
    timestamp: int = 0
    window: bytes  # struct tcp_repair_window
    receive_next: int
    write_next: int
    received: bytes = b""  # come, acknowledged, not read by the program
    sent: bytes = b""  # gone, not acknowledged
    unsent: bytes = b""  # written by the program, not gone


def matches(file: OpenFile, scope: Scope) -> bool:
    """Any TCP socket that does not listen."""
    return is_tcp(file, scope) and read_state(scope.hold_socket(file).sock) != State.LISTEN


def is_tcp(file: OpenFile, scope: Scope) -> bool:
    """Whether it is a socket of TCP proper (MPTCP has a protocol number of its own)."""
    if not file.link.startswith("socket:["):
        return False
    held = scope.hold_socket(file)
    return held.family in FAMILIES and held.protocol == _TCP


def read_state(sock: socket.socket) -> State:
    """The first byte of struct tcp_info."""
    return State(sock.getsockopt(_TCP, TCP_INFO, 1)[0])


def check(file: OpenFile, scope: Scope) -> list[Refusal]:
    """States and extras that repair mode cannot give back. Transient states are not refused: dump tells."""
    sock = scope.hold_socket(file).sock
    state = read_state(sock)
    refusals = check_extras(file, scope)
    if state in CONNECTED and scope.tcp_mode == "fail":
        refusals.append(scope.refusal(file, "tcp-connection", "a connection is open, and --tcp fail was asked for"))
    return refusals


def check_extras(file: OpenFile, scope: Scope) -> list[Refusal]:
    """What any TCP socket may have that is not carried."""
    sock = scope.hold_socket(file).sock
    refusals = []
    if has_filter(sock):
        refusals.append(scope.refusal(file, "socket-filter", "a BPF filter is attached"))
    if sock.getsockopt(_TCP, TCP_ULP, 16).strip(b"\0"):
        refusals.append(scope.refusal(file, "tcp-ulp", "an upper layer (TLS) runs in the kernel", "turn kTLS off"))
    if _peek_offset(sock) > 0:
        refusals.append(scope.refusal(file, "peek-offset", "SO_PEEK_OFF is set"))
    return refusals


def _peek_offset(sock: socket.socket) -> int:
    try:
        return sock.getsockopt(_SO, SO_PEEK_OFF)
    except OSError:
        return -1  # TCP has it since 6.9


def prepare(file: OpenFile, scope: Scope, template: Template) -> PreparedSocket:
    """Everything slow of `dump`; the socket is not changed. Raises: KernelError."""
    held = scope.hold_socket(file)
    info = held.sock.getsockopt(_TCP, TCP_INFO, _INFO_BYTES)
    state = State(info[0])
    return PreparedSocket(
        held=held,
        local=Address.of(held.sock.getsockname()),
        peer=Address.of(held.sock.getpeername()) if state in CONNECTED else None,
        options=template.differing(held.sock, held.family, _TCP),
        buffers=read_buffers(held.sock),
        scales=info[6],
        negotiated=info[5],
    )


def dump(file: OpenFile, scope: Scope, prepared: PreparedSocket) -> TcpConnection | TcpClosed | TcpOver:
    """The connection, in repair mode from here on. Frozen and cut off, else data is lost.

    Raises: TransientStateError: it has just come up. UnsupportedError. KernelError.
    """
    sock = prepared.held.sock
    state = read_state(sock)
    if state == State.CLOSE:
        return dump_over(file, prepared, reset=False) if is_over(sock) else dump_closed(file, prepared)
    if state == State.SYN_SENT:
        return dump_closed(file, prepared, find_peer(file, scope, prepared.held.family))
    if state not in CONNECTED or prepared.peer is None:
        raise TransientStateError(
            f"process {scope.container_pid}, fd {file.fd}: a TCP connection has just come up ({state.name})"
        )
    if scope.tcp_mode == "fail":
        raise scope.refuse(file, "tcp-connection", "a connection is open, and --tcp fail was asked for")
    if scope.tcp_mode == "close":
        enter_repair(sock)  # the peer is to hear nothing of it here either: the target's address answers with a reset
        return dump_over(file, prepared, reset=True)
    return _dump_connected(file, prepared, prepared.peer, state)


def _dump_connected(file: OpenFile, prepared: PreparedSocket, peer: Address, state: State) -> TcpConnection:
    sock = prepared.held.sock
    getsockopt, setsockopt = sock.getsockopt, sock.setsockopt
    options = refresh_volatile(sock, prepared.options)
    enter_repair(sock)
    fd = sock.fileno()
    queued, unsent_size, waiting = _size(fd, termios.TIOCOUTQ), _size(fd, SIOCOUTQNSD), _size(fd, termios.FIONREAD)
    fin_came, fin_went = state in FIN_CAME, state in FIN_WENT
    window = getsockopt(_TCP, TCP_REPAIR_WINDOW, WINDOW_BYTES)
    timestamp = getsockopt(_TCP, TCP_TIMESTAMP) if prepared.negotiated & TCPI_OPT_TIMESTAMPS else 0
    mss = getsockopt(_TCP, TCP_MAXSEG)
    setsockopt(_TCP, TCP_REPAIR_QUEUE, RECV_QUEUE)
    receive_next = getsockopt(_TCP, TCP_QUEUE_SEQ)
    received = _peek(sock, waiting, "receive") if waiting else b""
    setsockopt(_TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)
    write_next = getsockopt(_TCP, TCP_QUEUE_SEQ)
    if fin_went:
        # Our FIN takes a number of its own, in the queue until it is acknowledged.
        write_next -= 1
        queued = max(queued - 1, 0)
        unsent_size = max(unsent_size - 1, 0)
    written = _peek(sock, queued, "send") if queued else b""
    setsockopt(_TCP, TCP_REPAIR_QUEUE, NO_QUEUE)
    sent_size = len(written) - unsent_size
    return TcpConnection(
        id=file.id,
        flags=status_flags(file.flags),
        family=prepared.held.family,
        local=prepared.local,
        peer=peer,
        options=options,
        buffers=prepared.buffers,
        fin_came=fin_came,
        fin_went=fin_went,
        mss=mss,
        send_scale=prepared.scales & 15,
        receive_scale=prepared.scales >> 4,
        negotiated=prepared.negotiated,
        timestamp=timestamp % _SEQUENCES,
        window=window,
        receive_next=(receive_next - fin_came) % _SEQUENCES,
        write_next=write_next % _SEQUENCES,
        received=received,
        sent=written[:sent_size],
        unsent=written[sent_size:],
    )


def _size(fd: int, request: int) -> int:
    buffer = array.array("i", [0])
    fcntl.ioctl(fd, request, buffer)
    return buffer[0]


def _peek(sock: socket.socket, size_bytes: int, queue: str) -> bytes:
    """All that is in the chosen queue. Raises: UnsupportedError: urgent data, or less than the kernel promised."""
    data = sock.recv(size_bytes, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    if len(data) != size_bytes:
        raise UnsupportedError(
            f"the {queue} queue of a TCP connection has {size_bytes} bytes and shows {len(data)}: urgent data?",
            code="tcp-queue",
        )
    return data


def enter_repair(sock: socket.socket) -> None:
    """Repair mode: nothing is sent from here on, close is silent. SO_REUSEADDR stays what it was.

    Raises: KernelError: not allowed.   Source: tcp(7); CAP_NET_ADMIN over the namespace.
    """
    reuse = sock.getsockopt(_SO, SO_REUSEADDR)
    try:
        sock.setsockopt(_TCP, TCP_REPAIR, REPAIR_ON)
    except OSError as error:
        raise KernelError("setsockopt(TCP_REPAIR)", error.errno or 0, error.strerror or "") from error
    # The kernel overwrites it with 'forced' here and with 'no' at the end: kept readable for whoever ends it.
    sock.setsockopt(_SO, SO_REUSEADDR, reuse)


def leave_repair(sock: socket.socket, how: int) -> bool:
    """End repair mode, if it is on, by REPAIR_OFF (with a window probe) or REPAIR_OFF_NO_WP. Idempotent."""
    if not sock.getsockopt(_TCP, TCP_REPAIR):
        return False
    reuse = sock.getsockopt(_SO, SO_REUSEADDR)
    sock.setsockopt(_TCP, TCP_REPAIR, how)
    if reuse:
        sock.setsockopt(_SO, SO_REUSEADDR, 1)
    return True


def pack_repair_options(record: TcpConnection) -> bytes:
    """struct tcp_repair_opt[]: what was agreed on at the handshake.   Source: linux/tcp.h, TCPOPT_* of net/tcp.h."""
    packed = struct.pack("II", 2, record.mss)
    if record.negotiated & TCPI_OPT_WSCALE:
        packed += struct.pack("II", 3, record.send_scale | record.receive_scale << 16)
    if record.negotiated & TCPI_OPT_SACK:
        packed += struct.pack("II", 4, 0)
    if record.negotiated & TCPI_OPT_TIMESTAMPS:
        packed += struct.pack("II", 8, 0)
    return packed
