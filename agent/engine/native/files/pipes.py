"""Pipes whose ends the container holds: bytes and packets left in them, capacity, both ends or only one.

Does not survive: a pipe shared with a process outside (unless it is the runtime's stdio); named pipes.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import stat
import termios

import msgspec

from agent.engine.native.files import stdio
from agent.engine.native.files.base import ObjectRecord, OpenFile, Scope, Workshop, set_flags, status_flags
from agent.engine.native.files.calls import tee
from protocol.errors import KernelError
from protocol.messages import Refusal


class PipeEnd(ObjectRecord, frozen=True, kw_only=True, tag="pipe"):
    """One end; both ends carry the same `pipe`, the contents travel with the one that has `has_contents`."""

    pipe: int  # inode on the source: identity only
    capacity: int  # bytes
    contents: list[bytes] = msgspec.field(default_factory=list)
    has_contents: bool = False
    writers: bool  # whether anybody still holds the other ends, in the process
    readers: bool


def matches(file: OpenFile, scope: Scope) -> bool:  # noqa: ARG001 - the interface of all kinds
    """An anonymous pipe."""
    return file.link.startswith("pipe:[")


def _ends(file: OpenFile, scope: Scope) -> tuple[bool, bool]:
    """Whether the process itself holds a (reading, writing) end of this pipe."""
    same = [other for other in scope.files if other.kind == stat.S_IFIFO and other.inode == file.inode]
    reading = any(other.access in {os.O_RDONLY, os.O_RDWR} for other in same)
    return reading, any(other.access in {os.O_WRONLY, os.O_RDWR} for other in same)


def is_shared_outside(file: OpenFile, scope: Scope) -> bool:
    """Whether an end that exists is not the process's: it asks the pipe itself, who counts its open files."""
    reading, writing = _ends(file, scope)
    if reading and writing:
        return False
    poller = select.poll()
    fd = scope.take(file)
    poller.register(fd, 0)
    events = poller.poll(0)
    gone = bool(events and events[0][1] & (select.POLLHUP | select.POLLERR))
    return not gone


def check(file: OpenFile, scope: Scope) -> list[Refusal]:
    """A pipe to the outside must be the runtime's stdio."""
    if is_shared_outside(file, scope):
        return stdio.check_outside(file, scope)
    return []


def dump(file: OpenFile, scope: Scope) -> PipeEnd | stdio.ExternalStdio:
    """The end, and with the first end that can read what is inside."""
    if is_shared_outside(file, scope):
        return stdio.dump_outside(file, scope)
    reading, writing = _ends(file, scope)
    fd = scope.take(file)
    first_reader = next(
        (
            other
            for other in scope.files
            if other.kind == stat.S_IFIFO and other.inode == file.inode and other.access != os.O_WRONLY
        ),
        None,
    )
    capacity = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    return PipeEnd(
        id=file.id,
        flags=status_flags(file.flags),
        pipe=file.inode,
        capacity=capacity,
        contents=_read_contents(fd, capacity) if first_reader is file else [],
        has_contents=first_reader is file,
        writers=writing,
        readers=reading,
    )


def pending_bytes(fd: int) -> int:
    """Bytes waiting in a pipe or socket.   Source: FIONREAD, ioctl_fionread(2const)."""
    buffer = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, buffer)
    return buffer[0]


def _read_contents(fd: int, capacity: int) -> list[bytes]:
    """All that is in the pipe, unread, in the pieces it was written in (packets of O_DIRECT pipes stay apart)."""
    size = pending_bytes(fd)
    if not size:
        return []
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT)
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, capacity)
        copied = tee(fd, writer, size)
        contents = []
        while copied > 0:
            # tee duplicates the buffers with their flags: a packet is read whole, plain bytes run together.
            piece = os.read(reader, 1 << 20)
            contents.append(piece)
            copied -= len(piece)
        return contents
    finally:
        os.close(reader)
        os.close(writer)


def restore(record: PipeEnd, workshop: Workshop) -> int:
    """One end of the pipe that its first end made. Raises: KernelError."""
    key = f"pipe:{record.pipe}"
    if key not in workshop.pairs:
        workshop.pairs[key] = os.pipe2(os.O_CLOEXEC)
        _fit(workshop.pairs[key][1], record)
    reader, writer = workshop.pairs[key]
    if record.contents:
        _fill(writer, record)
    access = record.flags & os.O_ACCMODE
    if access == os.O_RDWR:
        # Both directions in one open file: only a path gives that, and a pipe has one in our own /proc.
        fd = os.open(f"/proc/self/fd/{reader}", os.O_RDWR | os.O_CLOEXEC)
    else:
        fd = os.dup(reader if access == os.O_RDONLY else writer)
    set_flags(fd, record.flags)
    if record.flags & os.O_DIRECT:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    return fd


def _fit(fd: int, record: PipeEnd) -> None:
    if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) != record.capacity:
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, record.capacity)
        except OSError as error:
            raise KernelError("fcntl(F_SETPIPE_SZ)", error.errno or 0, error.strerror or "") from error


def _fill(writer: int, record: PipeEnd) -> None:
    """Write the contents, packet by packet, never blocking."""
    before = fcntl.fcntl(writer, fcntl.F_GETFL)
    packets = os.O_DIRECT if len(record.contents) > 1 or record.flags & os.O_DIRECT else 0
    fcntl.fcntl(writer, fcntl.F_SETFL, before | os.O_NONBLOCK | packets)
    try:
        for piece in record.contents:
            if os.write(writer, piece) != len(piece):
                raise KernelError("write(pipe)", 0, f"the pipe of {record.capacity} bytes did not take its contents")
    finally:
        fcntl.fcntl(writer, fcntl.F_SETFL, before)
