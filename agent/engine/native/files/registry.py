"""All kinds of open files, in the order they are asked. A new kind is one file and its lines here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agent.engine.native.files import (
    devices,
    epoll,
    eventfd,
    netlink_sockets,
    pipes,
    regular_files,
    signalfd,
    stdio,
    tcp,
    tcp_listen,
    tcp_restore,
    tcp_unconnected,
    timerfd,
    udp,
    unix_sockets,
    unsupported,
)
from agent.engine.native.files.base import Kind, ObjectRecord, OpenFile, Scope, SocketKind, Workshop
from agent.engine.native.files.devices import MemoryDevice
from agent.engine.native.files.epoll import Epoll
from agent.engine.native.files.eventfd import EventFd
from agent.engine.native.files.netlink_sockets import NetlinkSocket
from agent.engine.native.files.pipes import PipeEnd
from agent.engine.native.files.regular_files import RegularFile
from agent.engine.native.files.signalfd import SignalFd
from agent.engine.native.files.stdio import ExternalStdio
from agent.engine.native.files.tcp import TcpConnection
from agent.engine.native.files.tcp_listen import TcpListener
from agent.engine.native.files.tcp_unconnected import TcpClosed, TcpOver
from agent.engine.native.files.timerfd import TimerFd
from agent.engine.native.files.udp import UdpSocket
from agent.engine.native.files.unix_sockets import UnixSocket

ObjectOnWire = (
    RegularFile | MemoryDevice | ExternalStdio | PipeEnd | EventFd | TimerFd | SignalFd | Epoll
    | TcpListener | TcpConnection | TcpClosed | TcpOver | UdpSocket | UnixSocket
    | NetlinkSocket
)  # fmt: skip

# The first that matches has it; the last matches all.
_KINDS: tuple[Kind, ...] = (
    devices, pipes, eventfd, timerfd, signalfd, epoll, netlink_sockets, stdio, regular_files, unsupported,
)  # fmt: skip
# Asked first for every socket: much of them is read before the freeze.
_SOCKET_KINDS: tuple[SocketKind, ...] = (tcp_listen, tcp, udp, unix_sockets)

_RESTORE: dict[type[ObjectRecord], Callable[[Any, Workshop], int]] = {
    RegularFile: regular_files.restore,
    MemoryDevice: devices.restore,
    ExternalStdio: stdio.restore,
    PipeEnd: pipes.restore,
    EventFd: eventfd.restore,
    TimerFd: timerfd.restore,
    SignalFd: signalfd.restore,
    Epoll: epoll.restore,
    TcpListener: tcp_listen.restore,
    TcpClosed: tcp_unconnected.restore_closed,
    TcpOver: tcp_unconnected.restore_over,
    UdpSocket: udp.restore,
    NetlinkSocket: netlink_sockets.restore,
    TcpConnection: tcp_restore.restore,
}


def find_socket_kind(file: OpenFile, scope: Scope) -> SocketKind | None:
    """The kind whose static part is read before the freeze."""
    if not file.link.startswith("socket:["):
        return None
    return next((kind for kind in _SOCKET_KINDS if kind.matches(file, scope)), None)


def find_kind(file: OpenFile, scope: Scope) -> Kind:
    """The kind of any other open file; `unsupported` has what nobody else takes."""
    return next(kind for kind in _KINDS if kind.matches(file, scope))


def restore_object(record: ObjectRecord, workshop: Workshop) -> int:
    """Make one open file: our descriptor of it. Raises: KernelError, UnsupportedError."""
    return _RESTORE[type(record)](record, workshop)
