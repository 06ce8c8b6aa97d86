"""Descriptors of ours put under given numbers of a stopped process, in two batches of its own system calls.

recvmsg(2) gives the lowest free numbers in order, so a run of messages lands where it should when the holes are filled
with /dev/null and closed after. What lies behind a wide gap is received low and moved up.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from agent.engine.native.files.base import Remote
from agent.engine.native.tasks.plan import CallPlan
from agent.kernel.memory import process_vm_write
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
_INT = 4
# A call's row and its message's headers; see CallPlan for the arena.
_MESSAGE_OVERHEAD = 256


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
    then: Callable[[CallPlan], None],
    arena_bytes: int = 0,
) -> None:
    """Make the process's table be exactly `objects` (its number -> our descriptor), then run the calls `then` adds.

    Everything that is open there is closed first. Our descriptors stay ours.
    Raises: KernelError: a call in the process failed, or a descriptor landed elsewhere.
    """
    wanted = sorted(objects)
    spare = _free_number(wanted)
    pair_plan = _Arena(pid, remote, 4096)
    plan = pair_plan.plan
    for number in descriptors(pid):
        plan.must(f"close({number})", SYS.close, number)
    pair = plan.reserve(8)
    plan.must("socketpair", SYS.socketpair, socket.AF_UNIX, socket.SOCK_STREAM, 0, pair)
    # All are closed, so the pair is 0 and 1; the second goes where no object will be.
    plan.must(f"dup3(1, {spare})", SYS.dup3, 1, spare, 0)
    plan.must("close(1)", SYS.close, 1)
    pair_plan.run()
    if struct.unpack("2i", plan.read(pair, 8)) != (0, 1):
        raise KernelError("socketpair in the container", errno.EBUSY, "not the lowest numbers: is a thread running?")
    _send_and_receive(pid, remote, objects, spare, cloexec, then, plan_layout(wanted, spare), arena_bytes)


def _free_number(wanted: Sequence[int]) -> int:
    """The lowest from 2 on that no object will have."""
    taken = set(wanted)
    number = 2
    while number in taken:
        number += 1
    return number


def _send_and_receive(
    pid: int,
    remote: Remote,
    objects: dict[int, int],
    spare: int,
    cloexec: Iterable[int],
    then: Callable[[CallPlan], None],
    layout: Layout,
    arena_bytes: int,
) -> None:
    chunks = [layout.received[at : at + MAX_AT_ONCE] for at in range(0, len(layout.received), MAX_AT_ONCE)]
    size = sum(_INT * len(chunk) + _MESSAGE_OVERHEAD for chunk in chunks) + arena_bytes + 4096
    arena = _Arena(pid, remote, size)
    plan = arena.plan
    plan.must("close(0)", SYS.close, 0)
    controls = [(_plan_receive(plan, spare, len(chunk)), [number for number, _ in chunk]) for chunk in chunks]
    for source, target in reversed(layout.moves):
        plan.must(f"dup3({source}, {target})", SYS.dup3, source, target, 0)
        plan.must(f"close({source})", SYS.close, source)
    for number, owner in layout.received:
        if owner is None:
            plan.must(f"close({number})", SYS.close, number)
    plan.must(f"close({spare})", SYS.close, spare)
    for number in cloexec:
        plan.must(f"fcntl({number}, F_SETFD)", SYS.fcntl, number, _F_SETFD, _FD_CLOEXEC)
    then(plan)
    with _opposite_end(pid) as ours:
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            for chunk in chunks:
                send_descriptors(ours, [null if owner is None else objects[owner] for _, owner in chunk])
        finally:
            os.close(null)
        arena.run()
    for control, expected in controls:
        got = struct.unpack(f"{len(expected)}i", plan.read(control + _CMSG_HEADER, _INT * len(expected)))
        if list(got) != expected:
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


def _plan_receive(plan: CallPlan, spare: int, count: int) -> int:
    """One recvmsg of `count` descriptors; gives the address of its control message.   Source: struct user_msghdr."""
    byte = plan.reserve(8)
    vector = plan.place(struct.pack("QQ", byte, 1))
    control_bytes = _CMSG_HEADER + -(-_INT * count // 8) * 8
    control = plan.reserve(control_bytes)
    header = plan.place(struct.pack("QIxxxxQQQQixxxx", 0, 0, vector, 1, control, _CMSG_HEADER + _INT * count, 0))
    plan.must(f"recvmsg({count} descriptors)", SYS.recvmsg, spare, header, 0)
    return control


class _Arena:
    """A plan in scratch memory of the process, and how it is run."""

    def __init__(self, pid: int, remote: Remote, size_bytes: int) -> None:
        self._pid = pid
        self._remote = remote
        self.plan = CallPlan(remote.place(bytes(size_bytes)), size_bytes)

    def run(self) -> None:
        """Raises: KernelError: a call that must succeed failed."""
        plan = self.plan
        process_vm_write(self._pid, plan.base, plan.memory)
        results = self._remote.batch(plan.calls, keep_going=True)
        plan.load(results, self._remote.read(plan.base, len(plan.memory)))
