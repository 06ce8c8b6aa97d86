"""Descriptors of ours put under given numbers of a stopped process, in two batches of its own system calls.

recvmsg(2) gives the lowest free numbers in order, so a run of messages lands where it should when the holes are filled
with /dev/null and closed after. What lies behind a wide gap is received low and moved up.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from agent.engine.native.files.base import Remote
from agent.kernel.pidfd import pidfd_getfd, pidfd_open
from agent.kernel.procfs import descriptors
from agent.kernel.scm import MAX_AT_ONCE, send_descriptors
from agent.kernel.unistd import SYS
from protocol.errors import KernelError

# asm-generic/fcntl.h
_F_SETFD = 2
_FD_CLOEXEC = 1
# Filling a hole costs less than moving a descriptor until the gap is about this wide.
_WIDE_GAP = 64
_CMSG_HEADER = 16  # struct cmsghdr on 64 bits
_INT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """Which numbers are received, in order: `low` as they are (holes among them), `moves` from a number to its own."""

    received: list[tuple[int, int | None]]  # (number it lands on, number whose object it is; None: a hole)
    moves: list[tuple[int, int]] = field(default_factory=list)  # (from, to), to be done in reverse


def plan_layout(wanted: Sequence[int], taken: int) -> Layout:
    """Where each of the ascending `wanted` numbers lands when all but `taken` are free."""
    received: list[tuple[int, int | None]] = []
    moves: list[tuple[int, int]] = []
    at = 0
    is_moving = False
    for number in wanted:
        is_moving = is_moving or number - at > _WIDE_GAP
        while not is_moving and at < number:
            if at != taken:
                received.append((at, None))
            at += 1
        at += at == taken
        received.append((at, number))
        if at != number:
            moves.append((at, number))
        at += 1
    return Layout(received=received, moves=moves)


def place_descriptors(
    pid: int,
    remote: Remote,
    objects: dict[int, int],
    cloexec: Iterable[int],
    then: Iterable[Sequence[int]] = (),
) -> None:
    """Make the process's table be exactly `objects` (its number -> our descriptor), then make the calls `then`.

    Everything that is open there is closed first. Our descriptors stay ours.
    Raises: KernelError: a call in the process failed, or a descriptor landed elsewhere.
    """
    wanted = sorted(objects)
    spare = _free_number(wanted)
    pair = remote.reserve(8)
    calls: list[Sequence[int]] = [(SYS.close, number) for number in descriptors(pid)]
    calls.append((SYS.socketpair, socket.AF_UNIX, socket.SOCK_STREAM, 0, pair))
    # All are closed, so the pair is 0 and 1; the second goes where no object will be.
    calls += [(SYS.dup3, 1, spare, 0), (SYS.close, 1)]
    remote.batch(calls)
    if struct.unpack("2i", remote.read(pair, 8)) != (0, 1):
        raise KernelError("socketpair in the container", errno.EBUSY, "not the lowest numbers: is a thread running?")
    _send_and_receive(pid, remote, objects, spare, [*_closing(cloexec), *then], plan_layout(wanted, spare))


def _free_number(wanted: Sequence[int]) -> int:
    """The lowest from 2 on that no object will have."""
    taken = set(wanted)
    number = 2
    while number in taken:
        number += 1
    return number


def _closing(cloexec: Iterable[int]) -> list[Sequence[int]]:
    return [(SYS.fcntl, number, _F_SETFD, _FD_CLOEXEC) for number in cloexec]


def _send_and_receive(
    pid: int, remote: Remote, objects: dict[int, int], spare: int, then: Sequence[Sequence[int]], layout: Layout
) -> None:
    chunks = [layout.received[at : at + MAX_AT_ONCE] for at in range(0, len(layout.received), MAX_AT_ONCE)]
    messages = [_make_room(remote, len(chunk)) for chunk in chunks]
    calls: list[Sequence[int]] = [(SYS.close, 0)]
    calls += [(SYS.recvmsg, spare, message.header, 0) for message in messages]
    for source, target in reversed(layout.moves):
        calls += [(SYS.dup3, source, target, 0), (SYS.close, source)]
    calls += [(SYS.close, number) for number, owner in layout.received if owner is None]
    calls += [(SYS.close, spare), *then]
    with _opposite_end(pid) as ours:
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            for chunk in chunks:
                send_descriptors(ours, [null if owner is None else objects[owner] for _, owner in chunk])
        finally:
            os.close(null)
        remote.batch(calls)
    for message, chunk in zip(messages, chunks, strict=True):
        got = struct.unpack(f"{len(chunk)}i", remote.read(message.numbers, _INT_BYTES * len(chunk)))
        expected = tuple(number for number, _ in chunk)
        if got != expected:
            raise KernelError("recvmsg in the container", errno.EBADF, f"descriptors landed on {got}, not {expected}")


def _opposite_end(pid: int) -> socket.socket:
    """The end of the pair that the process has under 0."""
    pidfd = pidfd_open(pid)
    try:
        ours = socket.socket(fileno=pidfd_getfd(pidfd, 0))
    finally:
        os.close(pidfd)
    if ours.family != socket.AF_UNIX:
        ours.close()
        raise KernelError("pidfd_getfd in the container", errno.EBADF, "descriptor 0 is not the socket made there")
    return ours


@dataclass(frozen=True, slots=True)
class _Room:
    """Addresses in the process: of a message header, and of the numbers that come with it."""

    header: int
    numbers: int


def _make_room(remote: Remote, count: int) -> _Room:
    """For one recvmsg of `count` descriptors.   Source: struct user_msghdr (linux/socket.h), on 64 bits."""
    byte = remote.reserve(8)
    vector = remote.place(struct.pack("QQ", byte, 1))
    control = remote.reserve(_CMSG_HEADER + _INT_BYTES * (count + 1))
    header = struct.pack("QIxxxxQQQQixxxx", 0, 0, vector, 1, control, _CMSG_HEADER + _INT_BYTES * count, 0)
    return _Room(header=remote.place(header), numbers=control + _CMSG_HEADER)
