"""timerfd: clock, time left, interval, expirations that nobody has read.

Does not survive: the length of the freeze: a timer goes off that much later. Absolute timers of the wall clock keep
their moment.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import time

from agent.engine.native.files.base import ObjectRecord, OpenFile, Scope, Workshop, set_flags, status_flags
from agent.engine.native.files.table import read_open_file
from protocol.errors import KernelError
from protocol.messages import Refusal

_libc = ctypes.CDLL(None, use_errno=True)

# linux/timerfd.h
TFD_TIMER_ABSTIME = 1
TFD_TIMER_CANCEL_ON_SET = 2
TFD_IOC_SET_TICKS = 0x40085400
_NS_PER_S = 1_000_000_000
# linux/time.h: the clocks of the wall, which may be set.
_WALL_CLOCKS = {0: time.CLOCK_REALTIME, 8: time.CLOCK_REALTIME}


class TimerFd(ObjectRecord, frozen=True, kw_only=True, tag="timerfd"):
    """`left_ns` 0: not armed. `expires_ns`: the moment on the wall clock, for absolute timers of it."""

    clock: int
    left_ns: int
    interval_ns: int
    ticks: int
    set_flags: int
    expires_ns: int = 0


def matches(file: OpenFile, scope: Scope) -> bool:  # noqa: ARG001 - the interface of all kinds
    """A timerfd."""
    return file.link == "anon_inode:[timerfd]"


def check(file: OpenFile, scope: Scope) -> list[Refusal]:  # noqa: ARG001 - the interface of all kinds
    """Nothing is refused."""
    return []


def dump(file: OpenFile, scope: Scope) -> TimerFd:
    """The timer as its owner would see it. Raises: KernelError."""
    # timerfd_gettime starts a periodic timer that went off unread again; fdinfo alone would show it as not armed.
    value = ctypes.create_string_buffer(32)
    if _libc.timerfd_gettime(scope.take(file), value) < 0:
        number = ctypes.get_errno()
        raise KernelError("timerfd_gettime(2)", number, os.strerror(number))
    interval_s, interval_ns, left_s, left_ns = struct.unpack("4q", value.raw)
    now, _ = read_open_file(scope.pid, file.fd)
    fields = now.fields()
    clock, flags = int(fields["clockid"]), int(fields["settime flags"], 8)
    left = left_s * _NS_PER_S + left_ns
    absolute = flags & TFD_TIMER_ABSTIME and clock in _WALL_CLOCKS and left
    return TimerFd(
        id=file.id,
        flags=status_flags(file.flags),
        clock=clock,
        left_ns=left,
        interval_ns=interval_s * _NS_PER_S + interval_ns,
        ticks=int(fields["ticks"]),
        set_flags=flags,
        expires_ns=time.clock_gettime_ns(_WALL_CLOCKS[clock]) + left if absolute else 0,
    )


def restore(record: TimerFd, workshop: Workshop) -> int:  # noqa: ARG001 - the interface of all kinds
    """Make it, set it, give it its unread expirations.   Source: timerfd_create(2). Raises: KernelError."""
    fd: int = _libc.timerfd_create(record.clock, os.O_CLOEXEC | (record.flags & os.O_NONBLOCK))
    if fd < 0:
        raise _failed("timerfd_create(2)")
    if record.left_ns:
        value, how = record.left_ns, 0
        if record.expires_ns:
            value, how = record.expires_ns, record.set_flags & (TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET)
        packed = struct.pack("4q", *divmod(record.interval_ns, _NS_PER_S), *divmod(value, _NS_PER_S))
        if _libc.timerfd_settime(fd, how, packed, None) < 0:
            raise _failed("timerfd_settime(2)")
    if record.ticks:
        fcntl.ioctl(fd, TFD_IOC_SET_TICKS, struct.pack("Q", record.ticks))
    set_flags(fd, record.flags)
    return fd


def _failed(call: str) -> KernelError:
    number = ctypes.get_errno()
    return KernelError(call, number, os.strerror(number))
