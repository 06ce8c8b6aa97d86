"""Unix sockets inside the container: pairs, listeners and datagram sockets, by path, abstract or unnamed, with what is
in their queues.

Does not survive: descriptors in a queue (refused); who sent a message or connected (SCM_CREDENTIALS, SO_PEERCRED give
the agent); the name of a connected socket whose listener is gone. Refused: a peer outside the container.
"""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass

import msgspec

from agent.engine.native.files import stdio
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
    Address,
    Buffers,
    Option,
    Template,
    has_filter,
    read_buffers,
)
from agent.engine.native.files.unix_diag import UnixFacts
from agent.kernel.openat2 import open_in_root
from protocol.errors import KernelError
from protocol.messages import Refusal

_SO = socket.SOL_SOCKET
_ESTABLISHED = 1
_LISTEN = 10  # net/tcp_states.h, which unix sockets use too
_LARGEST_MESSAGE = 1 << 18  # more than the default limit of a send buffer; grows when a message is larger
_SCM_CREDENTIALS = 2  # linux/socket.h
_SHUT_READING = 1
_SHUT_BOTH = 3


class SocketFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file of a socket that is bound to a path."""

    mode: int
    uid: int
    gid: int


class UnixSocket(ObjectRecord, frozen=True, kw_only=True, tag="unix-socket"):
    """`inode` and `peer` name sockets of this section; `peer` 0: none (any more). `name` as in sun_path."""

    inode: int
    peer: int
    socket_type: int
    listening: bool = False
    backlog: int = 0
    name: bytes = b""
    file: SocketFile | None = None
    options: list[Option]
    buffers: Buffers
    queue: list[bytes] = msgspec.field(default_factory=list)
    shutdown: int = 0
    was_connected: bool = False


@dataclass(frozen=True, slots=True)
class _Address:
    """sun_path, as bytes; b'' for an unnamed socket."""

    name: bytes

    @classmethod
    def of(cls, sock: socket.socket) -> _Address:
        name = sock.getsockname()
        return cls(name if isinstance(name, bytes) else os.fsencode(name))

    @property
    def is_path(self) -> bool:
        return bool(self.name) and not self.name.startswith(b"\0")


def matches(file: OpenFile, scope: Scope) -> bool:
    """Any unix socket."""
    return file.link.startswith("socket:[") and scope.hold_socket(file).family == socket.AF_UNIX


def check(file: OpenFile, scope: Scope) -> list[Refusal]:
    """A peer outside, a name that leads elsewhere, a filter."""
    sock = scope.hold_socket(file).sock
    facts = scope.unix_diag().look_up(file.inode)
    if facts.peer and not _is_inside(facts.peer, scope):
        return stdio.check_outside(file, scope)
    if _waits_to_be_accepted(facts, scope.hold_socket(file).kind) and not _own_listener(sock, scope):
        return stdio.check_outside(file, scope)
    refusals = []
    if has_filter(sock):
        refusals.append(scope.refusal(file, "socket-filter", "a BPF filter is attached"))
    address = _Address.of(sock)
    if address.is_path and (facts.state == _LISTEN or scope.hold_socket(file).kind == socket.SOCK_DGRAM):
        refusals += _check_path(file, scope, address)
    return refusals


def _is_inside(inode: int, scope: Scope) -> bool:
    return inode in scope.socket_inodes


def _waits_to_be_accepted(facts: UnixFacts, kind: int) -> bool:
    """Connected, to a peer without an inode that is not gone: a listener's program has not taken it yet."""
    return kind != socket.SOCK_DGRAM and facts.state == _ESTABLISHED and not facts.peer and facts.shutdown != _SHUT_BOTH


def _own_listener(sock: socket.socket, scope: Scope) -> bool:
    """Whether the listener that it is connected to is the process's own."""
    name = sock.getpeername()
    return any(
        held.family == socket.AF_UNIX
        and held.sock.getsockname() == name
        and held.sock.getsockopt(_SO, socket.SO_ACCEPTCONN)
        for held in scope.held_sockets()
    )


def _check_path(file: OpenFile, scope: Scope, address: _Address) -> list[Refusal]:
    """A path is bound again at the target: it must mean the same there, and not be this host's file as well."""
    name = os.fsdecode(address.name)
    if not name.startswith("/"):
        return [scope.refusal(file, "unix-name", f"it is bound to the relative name {name!r}")]
    if scope.storage == "shared":
        return [
            scope.refusal(
                file, "unix-path-shared", f"it is bound to {name}: on shared storage one host would take it away"
            )
        ]
    return []


def prepare(file: OpenFile, scope: Scope, template: Template) -> PreparedSocket:
    """Options and buffers."""
    held = scope.hold_socket(file)
    return PreparedSocket(
        held=held,
        local=Address(host="", port=0),
        peer=None,
        options=template.differing(held.sock, held.family, held.protocol),
        buffers=read_buffers(held.sock),
    )


def dump(file: OpenFile, scope: Scope, prepared: PreparedSocket) -> UnixSocket | stdio.ExternalStdio:
    """The socket and its queue, which stays as it is.

    Raises: TransientStateError: connections that nobody has accepted, descriptors on their way. UnsupportedError.
    """
    sock = prepared.held.sock
    facts = scope.unix_diag().look_up(file.inode)
    if facts.peer and not _is_inside(facts.peer, scope):
        return stdio.dump_outside(file, scope)
    if _waits_to_be_accepted(facts, prepared.held.kind):
        raise TransientStateError(f"process {scope.container_pid}, fd {file.fd}: its connection waits to be accepted")
    listening = facts.state == _LISTEN
    if listening and facts.waiting:
        raise TransientStateError(
            f"process {scope.container_pid}, fd {file.fd}: {facts.waiting} connections wait to be accepted"
        )
    address = _Address.of(sock)
    return UnixSocket(
        id=file.id,
        flags=status_flags(file.flags),
        inode=file.inode,
        peer=facts.peer,
        socket_type=prepared.held.kind,
        listening=listening,
        backlog=facts.backlog if listening else 0,
        name=address.name,
        file=_read_file(address, facts, scope),
        options=prepared.options,
        buffers=prepared.buffers,
        queue=[] if listening else _read_queue(file, scope, sock, facts),
        shutdown=facts.shutdown,
        was_connected=facts.state == _ESTABLISHED,
    )


def _read_file(address: _Address, facts: UnixFacts, scope: Scope) -> SocketFile | None:
    """The file, when it is this very socket's and still there."""
    if not address.is_path or not facts.file_inode:
        return None
    try:
        fd = open_in_root(scope.root_fd, address.name, os.O_PATH | os.O_NOFOLLOW)
    except KernelError:
        return None
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    if not stat.S_ISSOCK(status.st_mode) or status.st_ino & 0xFFFFFFFF != facts.file_inode:
        return None
    return SocketFile(mode=stat.S_IMODE(status.st_mode), uid=status.st_uid, gid=status.st_gid)


def _read_queue(file: OpenFile, scope: Scope, sock: socket.socket, facts: UnixFacts) -> list[bytes]:
    """All messages (of a stream: its bytes), unread.   Source: SO_PEEK_OFF in socket(7)."""
    before = sock.getsockopt(_SO, SO_PEEK_OFF)
    sock.setsockopt(_SO, SO_PEEK_OFF, 0)
    try:
        return _peek_all(file, scope, sock, facts)
    finally:
        sock.setsockopt(_SO, SO_PEEK_OFF, before)


def _peek_all(file: OpenFile, scope: Scope, sock: socket.socket, facts: UnixFacts) -> list[bytes]:
    messages: list[bytes] = []
    kind = scope.hold_socket(file).kind
    # What a shut socket gives at its end looks like an empty datagram.
    has_end = kind != socket.SOCK_DGRAM or bool(facts.shutdown & _SHUT_READING)
    size = _LARGEST_MESSAGE
    while True:
        try:
            data, ancillary, flags, sender = sock.recvmsg(
                size, socket.CMSG_SPACE(1024), socket.MSG_PEEK | socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return messages
        except ConnectionError as error:
            raise TransientStateError(
                f"process {scope.container_pid}, fd {file.fd}: the peer has just gone, the program has not seen it"
            ) from error
        except OSError:
            return messages  # not connected: nothing can be in it
        _check_ancillary(file, scope, ancillary)
        if flags & socket.MSG_TRUNC:
            raise TransientStateError(
                f"process {scope.container_pid}, fd {file.fd}: a message of more than {size} bytes is in the queue"
            )
        if kind != socket.SOCK_STREAM and sender:
            raise TransientStateError(
                f"process {scope.container_pid}, fd {file.fd}: a message that names its sender ({sender!r}) waits"
            )
        if not data and has_end:
            return messages
        messages.append(data)


def _check_ancillary(file: OpenFile, scope: Scope, ancillary: list[tuple[int, int, bytes]]) -> None:
    for level, kind, content in ancillary:
        if level == _SO and kind == socket.SCM_RIGHTS:
            for at in range(0, len(content) - 3, 4):
                os.close(int.from_bytes(content[at : at + 4], "little", signed=True))
            raise TransientStateError(
                f"process {scope.container_pid}, fd {file.fd}: descriptors are on their way in its queue"
            )
        if level == _SO and kind == _SCM_CREDENTIALS:
            warning = f"process {scope.container_pid}, fd {file.fd}: queued messages lose who sent them"
            if warning not in scope.warnings:
                scope.warnings.append(warning)
