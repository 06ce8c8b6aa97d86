"""ptrace(2) on seized threads. All calls for one thread come from the one OS thread that seized it."""

from __future__ import annotations

import ctypes
import enum
import errno
import functools
import os
import struct
from dataclasses import dataclass
from typing import Any

from agent.kernel.syscalls import IoVector, failure, get_errno, libc
from agent.kernel.types import Tid
from protocol.errors import TaskGoneError

_ptrace = libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]

# linux/wait.h
WALL = 0x40000000


class Request(enum.IntEnum):
    """linux/ptrace.h"""

    CONT = 7
    DETACH = 17
    SYSCALL = 24
    SETOPTIONS = 0x4200
    GETEVENTMSG = 0x4201
    GETSIGINFO = 0x4202
    SETSIGINFO = 0x4203
    GETREGSET = 0x4204
    SETREGSET = 0x4205
    SEIZE = 0x4206
    INTERRUPT = 0x4207
    LISTEN = 0x4208
    PEEKSIGINFO = 0x4209
    GETSIGMASK = 0x420A
    SETSIGMASK = 0x420B
    SECCOMP_GET_FILTER = 0x420C
    GET_SYSCALL_INFO = 0x420E
    GET_RSEQ_CONFIGURATION = 0x420F


class Option(enum.IntFlag):
    """PTRACE_O_* (linux/ptrace.h)"""

    NONE = 0
    TRACESYSGOOD = 1
    TRACEFORK = 2
    TRACEVFORK = 4
    TRACECLONE = 8
    TRACEEXEC = 0x10
    TRACEVFORKDONE = 0x20
    TRACEEXIT = 0x40
    TRACESECCOMP = 0x80
    EXITKILL = 0x100000
    SUSPEND_SECCOMP = 0x200000


class Event(enum.IntEnum):
    """PTRACE_EVENT_* (linux/ptrace.h)"""

    NONE = 0
    FORK = 1
    VFORK = 2
    CLONE = 3
    EXEC = 4
    VFORK_DONE = 5
    EXIT = 6
    SECCOMP = 7
    STOP = 128


NEW_TASK_EVENTS = frozenset({Event.FORK, Event.VFORK, Event.CLONE})


class WaitKind(enum.Enum):
    RUNNING = "running"  # asked without waiting: nothing to report
    STOPPED = "stopped"
    EXITED = "exited"
    SIGNALED = "signaled"


_SYSCALL_STOP_SIGNAL = 5 | 0x80  # SIGTRAP with the bit of PTRACE_O_TRACESYSGOOD


@dataclass(frozen=True, slots=True)
class WaitStatus:
    """What wait told of a thread. `signal` of a stop, or the killer; `code` of an exit; `event` of a stop or 0."""

    tid: Tid
    kind: WaitKind
    signal: int = 0
    event: int = 0
    code: int = 0

    @property
    def is_stop(self) -> bool:
        return self.kind is WaitKind.STOPPED

    @property
    def is_gone(self) -> bool:
        return self.kind in {WaitKind.EXITED, WaitKind.SIGNALED}

    @property
    def is_syscall_stop(self) -> bool:
        """At the entry to or the exit from a system call (needs TRACESYSGOOD)."""
        return self.kind is WaitKind.STOPPED and self.signal == _SYSCALL_STOP_SIGNAL and self.event == 0

    @property
    def is_signal_stop(self) -> bool:
        """A signal is about to be delivered."""
        return self.kind is WaitKind.STOPPED and self.event == 0 and self.signal != _SYSCALL_STOP_SIGNAL


@dataclass(frozen=True, slots=True)
class RseqConfiguration:
    """struct ptrace_rseq_configuration; address 0 when none is registered."""

    address: int
    size_bytes: int
    signature: int
    flags: int


def _request(request: Request, tid: int, address: Any, data: Any) -> int:
    result: int = _ptrace(request, tid, address, data)
    if result == -1:
        raise failure(f"ptrace({request.name}, {tid})", get_errno())
    return result


def seize(tid: Tid, options: Option) -> None:
    """Attach to `tid` and leave it running.

    Raises: TaskGoneError: it is dead. KernelError: EPERM when another traces it.   Source: PTRACE_SEIZE (Linux 3.4).
    """
    _request(Request.SEIZE, tid, None, int(options))


def interrupt(tid: Tid) -> None:
    """Ask for an EVENT_STOP. On a stopped thread it takes effect when that goes on."""
    _request(Request.INTERRUPT, tid, None, None)


def cont(tid: Tid, signal: int = 0) -> None:
    """Let it run; `signal` is delivered when it stood at a signal stop."""
    _request(Request.CONT, tid, None, signal)


def syscall_stop(tid: Tid, signal: int = 0) -> None:
    """Let it run to the next entry to or exit from a system call."""
    _request(Request.SYSCALL, tid, None, signal)


def listen(tid: Tid) -> None:
    """Leave a thread in group-stop, hearing of SIGCONT."""
    _request(Request.LISTEN, tid, None, None)


def detach(tid: Tid, signal: int = 0) -> None:
    """Let go of a stopped thread."""
    _request(Request.DETACH, tid, None, signal)


def set_options(tid: Tid, options: Option) -> None:
    _request(Request.SETOPTIONS, tid, None, int(options))


def get_regset_into(tid: Tid, note: int, target: ctypes.Structure | ctypes.Array[ctypes.c_char]) -> int:
    """Fill `target` with the register set `note` (NT_*). Gives the number of bytes."""
    vector = IoVector(ctypes.addressof(target), ctypes.sizeof(target))
    _request(Request.GETREGSET, tid, note, ctypes.byref(vector))
    return vector.size


def get_regset(tid: Tid, note: int, limit_bytes: int = 16384) -> bytes:
    buffer = ctypes.create_string_buffer(limit_bytes)
    size = get_regset_into(tid, note, buffer)
    return buffer.raw[:size]


def set_regset_from(tid: Tid, note: int, source: ctypes.Structure | ctypes.Array[ctypes.c_char]) -> None:
    vector = IoVector(ctypes.addressof(source), ctypes.sizeof(source))
    _request(Request.SETREGSET, tid, note, ctypes.byref(vector))


def set_regset(tid: Tid, note: int, data: bytes) -> None:
    set_regset_from(tid, note, (ctypes.c_char * len(data)).from_buffer_copy(data))


def get_sigmask(tid: Tid) -> int:
    """Blocked signals; bit N-1 is signal N."""
    mask = ctypes.c_uint64()
    _request(Request.GETSIGMASK, tid, 8, ctypes.byref(mask))
    return mask.value


def set_sigmask(tid: Tid, mask: int) -> None:
    _request(Request.SETSIGMASK, tid, 8, ctypes.byref(ctypes.c_uint64(mask)))


SIGINFO_BYTES = 128
_PEEK_AT_ONCE = 32


def get_siginfo(tid: Tid) -> bytes:
    """siginfo_t of the present stop."""
    buffer = ctypes.create_string_buffer(SIGINFO_BYTES)
    _request(Request.GETSIGINFO, tid, None, ctypes.byref(buffer))
    return buffer.raw


def peek_siginfo(tid: Tid, shared: bool) -> list[bytes]:
    """The pending signals of the thread (or, shared, of its process), oldest first: siginfo_t of 128 bytes each.

    Source: PTRACE_PEEKSIGINFO (Linux 3.10).
    """
    found: list[bytes] = []
    while True:
        # struct ptrace_peeksiginfo_args {u64 off; u32 flags; s32 nr}
        arguments = ctypes.create_string_buffer(struct.pack("=QIi", len(found), int(shared), _PEEK_AT_ONCE), 16)
        buffer = ctypes.create_string_buffer(SIGINFO_BYTES * _PEEK_AT_ONCE)
        count = _request(Request.PEEKSIGINFO, tid, ctypes.byref(arguments), ctypes.byref(buffer))
        raw = buffer.raw
        found += [raw[SIGINFO_BYTES * i : SIGINFO_BYTES * (i + 1)] for i in range(count)]
        if count < _PEEK_AT_ONCE:
            return found


def get_event_message(tid: Tid) -> int:
    """New tid of a fork, vfork, clone; former tid of an exec; exit status of an exit."""
    message = ctypes.c_ulong()
    _request(Request.GETEVENTMSG, tid, None, ctypes.byref(message))
    return message.value


def get_rseq_configuration(tid: Tid) -> RseqConfiguration:
    """Source: PTRACE_GET_RSEQ_CONFIGURATION (Linux 5.13)."""
    buffer = ctypes.create_string_buffer(24)
    _request(Request.GET_RSEQ_CONFIGURATION, tid, 24, ctypes.byref(buffer))
    return RseqConfiguration(*struct.unpack("=QIII", buffer.raw[:20]))


def wait(tid: Tid, nohang: bool = False) -> WaitStatus:
    """Wait for the next report of `tid`; with `nohang` RUNNING when there is none.

    Raises: TaskGoneError: not a tracee or child of this thread (any more).   Source: waitpid(2).
    """
    try:
        pid, status = os.waitpid(tid, WALL | os.WNOHANG if nohang else WALL)
    except ChildProcessError as error:
        raise TaskGoneError(f"waitpid({tid}): not traced by this thread any more") from error
    except OSError as error:
        raise failure(f"waitpid({tid})", error.errno or errno.EINVAL) from error
    if pid == 0:
        return WaitStatus(tid, WaitKind.RUNNING)
    return decode_status(tid, status)


def decode_status(tid: Tid, status: int) -> WaitStatus:
    low = status & 0xFF
    if low == 0x7F:
        return WaitStatus(tid, WaitKind.STOPPED, (status >> 8) & 0xFF, status >> 16)
    if low & 0x7F == 0:
        return WaitStatus(tid, WaitKind.EXITED, code=(status >> 8) & 0xFF)
    return WaitStatus(tid, WaitKind.SIGNALED, low & 0x7F)


@functools.cache
def may_suspend_seccomp() -> bool:
    """Whether PTRACE_O_SUSPEND_SECCOMP is permitted: no seccomp filter on ourselves, and CAP_SYS_ADMIN.

    Source: ptrace(2), PTRACE_O_SUSPEND_SECCOMP (Linux 4.3).
    """
    with open("/proc/self/status", "rb") as status:  # noqa: PTH123 - one read
        fields = dict(line.split(b":\t", 1) for line in status.read().splitlines() if b":\t" in line)
    cap_sys_admin = 21
    return int(fields.get(b"Seccomp", b"0")) == 0 and bool(int(fields[b"CapEff"], 16) >> cap_sys_admin & 1)
