"""The target's half of unix_sockets.py."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from agent.engine.native.files.base import Workshop, set_flags
from agent.engine.native.files.inside_root import inside_root
from agent.engine.native.files.socket_options import set_buffers, set_options
from agent.engine.native.files.unix_sockets import UnixSocket
from agent.kernel.syscalls import os_failure
from protocol.errors import KernelError, UnsupportedError

_SHUT_READING, _SHUT_WRITING = 1, 2


def restore_all(records: Sequence[UnixSocket], workshop: Workshop) -> None:
    """All of them, since they lead to each other: listeners, then pairs, then what is left, then queues."""
    by_inode = {record.inode: record for record in records}
    made: dict[int, socket.socket] = {}
    try:
        for record in sorted(records, key=lambda record: not record.listening):
            if record.inode not in made:
                _make(record, by_inode, made, workshop)
        for record in records:
            if record.queue:
                _fill(record, made.get(record.peer) or made.get(-record.inode), workshop)
        for record in records:
            _finish(record, by_inode, made, workshop)
        for record in records:
            workshop.made[record.id] = made.pop(record.inode).detach()
    finally:
        for sock in made.values():
            sock.close()


def _make(
    record: UnixSocket, by_inode: dict[int, UnixSocket], made: dict[int, socket.socket], workshop: Workshop
) -> None:
    peer = by_inode.get(record.peer)
    if record.socket_type != socket.SOCK_DGRAM and not record.listening and (record.peer or record.was_connected):
        ours, theirs = _connected_pair(record, peer, by_inode, made, workshop)
        made[record.inode] = ours
        # Whoever the peer was, if it is gone our end of it goes too: after the queue is filled.
        made[peer.inode if peer else -record.inode] = theirs
        return
    if (
        record.socket_type == socket.SOCK_DGRAM
        and peer
        and peer.peer == record.inode
        and not record.name
        and not peer.name
    ):
        made[record.inode], made[peer.inode] = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        return
    sock = socket.socket(socket.AF_UNIX, record.socket_type | socket.SOCK_CLOEXEC)
    made[record.inode] = sock
    if record.name:
        _bind(sock, record, workshop)
    if record.listening:
        sock.listen(record.backlog)


def _connected_pair(
    record: UnixSocket,
    peer: UnixSocket | None,
    by_inode: dict[int, UnixSocket],
    made: dict[int, socket.socket],
    workshop: Workshop,
) -> tuple[socket.socket, socket.socket]:
    """Through its listener if that is here, so that the names are right; else a plain pair."""
    for accepted, other, swap in ((record, peer, False), (peer, record, True)):
        listener = _listener_of(accepted, by_inode, made)
        if listener is not None and other is not None:
            client = socket.socket(socket.AF_UNIX, record.socket_type | socket.SOCK_CLOEXEC)
            try:
                if other.name:
                    _bind(client, other, workshop)
                with inside_root(workshop.root_fd):
                    client.connect(accepted.name if accepted is not None else b"")
                server, _ = listener.accept()
            except OSError as error:
                client.close()
                raise os_failure("connect to a restored unix listener", error) from error
            return (client, server) if swap else (server, client)
    return socket.socketpair(socket.AF_UNIX, record.socket_type)


def _listener_of(
    record: UnixSocket | None, by_inode: dict[int, UnixSocket], made: dict[int, socket.socket]
) -> socket.socket | None:
    if record is None or not record.name:
        return None
    return next(
        (
            made[other.inode]
            for other in by_inode.values()
            if other.listening and other.name == record.name and other.inode in made
            if other.file is not None or other.name.startswith(b"\0")
        ),
        None,
    )


def _bind(sock: socket.socket, record: UnixSocket, workshop: Workshop) -> None:
    """To its name, as the container sees it; a socket file left over there is replaced.

    Raises: UnsupportedError: something else has the name. KernelError.
    """
    is_path = not record.name.startswith(b"\0")
    mask = os.umask(0o777)
    try:
        with inside_root(workshop.root_fd):
            if is_path:
                _remove_left_over(record.name)
            sock.bind(record.name)
            if is_path and record.file is None:
                os.unlink(record.name)  # noqa: PTH108 - bytes of sun_path; it was unlinked while in use
            elif record.file is not None:
                os.chown(record.name, record.file.uid, record.file.gid)
                os.chmod(record.name, record.file.mode)  # noqa: PTH101 - bytes of sun_path
    except OSError as error:
        raise KernelError(
            f"bind({os.fsdecode(record.name)!r})", error.errno or 0, error.strerror or "", hint="is the name taken?"
        ) from error
    finally:
        os.umask(mask)


def _remove_left_over(name: bytes) -> None:
    try:
        mode = os.lstat(name).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UnsupportedError(f"{os.fsdecode(name)} is no socket on this host", code="file-differs")
    os.unlink(name)  # noqa: PTH108 - bytes of sun_path


def _finish(
    record: UnixSocket, by_inode: dict[int, UnixSocket], made: dict[int, socket.socket], workshop: Workshop
) -> None:
    """The peer of a datagram socket, options, what was shut."""
    sock = made[record.inode]
    peer = by_inode.get(record.peer)
    lost = made.pop(-record.inode, None)
    if lost is not None:
        lost.close()
    if record.socket_type == socket.SOCK_DGRAM and peer is not None and (peer.name or record.name):
        if not peer.name:
            raise UnsupportedError("a datagram socket is connected to one without a name", code="unix-peer")
        with inside_root(workshop.root_fd):
            sock.connect(peer.name)
    set_options(sock, record.options)
    set_buffers(sock, record.buffers)
    if record.shutdown & _SHUT_READING and record.peer:
        sock.shutdown(socket.SHUT_RD)
    if record.shutdown & _SHUT_WRITING and record.peer:
        sock.shutdown(socket.SHUT_WR)
    set_flags(sock.fileno(), record.flags)


def _fill(record: UnixSocket, peer: socket.socket | None, workshop: Workshop) -> None:
    """Send the queue again, message by message, never waiting. Raises: KernelError: it does not fit."""
    with _sender(record, peer, workshop) as sender:
        overhead = 4096 * len(record.queue)
        set_buffers(sender, record.buffers, at_least_send=sum(map(len, record.queue)) + overhead)
        try:
            for message in record.queue:
                sent = sender.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                while sent < len(message):  # a stream takes what fits
                    sent += sender.send(message[sent:], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            raise os_failure("send into a restored unix socket", error) from error


@contextmanager
def _sender(record: UnixSocket, peer: socket.socket | None, workshop: Workshop) -> Iterator[socket.socket]:
    """What a queue is filled through: the peer, or for a datagram socket with a name one of our own for a moment."""
    if peer is not None and (record.socket_type != socket.SOCK_DGRAM or not record.name):
        yield peer
        return
    if not record.name:
        raise UnsupportedError("messages for a datagram socket that nobody can reach", code="unix-queue")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as own:
        with inside_root(workshop.root_fd):
            own.connect(record.name)
        yield own
