"""signalfd: its mask. The signals waiting for it are the task's own.

Does not survive: (everything does).
"""

from __future__ import annotations

import ctypes
import os
import struct

from agent.engine.native.files.base import ObjectRecord, OpenFile, Scope, Workshop, set_flags, status_flags
from protocol.errors import KernelError
from protocol.messages import Refusal

_libc = ctypes.CDLL(None, use_errno=True)
_SIGSET_BYTES = 128  # of glibc and musl; the kernel looks at the first 8


class SignalFd(ObjectRecord, frozen=True, kw_only=True, tag="signalfd"):
    """`mask`: bit 0 is signal 1."""

    mask: int


def matches(file: OpenFile, scope: Scope) -> bool:  # noqa: ARG001 - the interface of all kinds
    """A signalfd."""
    return file.link == "anon_inode:[signalfd]"


def check(file: OpenFile, scope: Scope) -> list[Refusal]:  # noqa: ARG001 - the interface of all kinds
    """Nothing is refused."""
    return []


def dump(file: OpenFile, scope: Scope) -> SignalFd:  # noqa: ARG001 - the interface of all kinds
    """Source: proc_pid_fdinfo(5)."""
    return SignalFd(id=file.id, flags=status_flags(file.flags), mask=int(file.fields()["sigmask"], 16))


def restore(record: SignalFd, workshop: Workshop) -> int:  # noqa: ARG001 - the interface of all kinds
    """Make it: it reads the signals of whoever reads it.   Source: signalfd(2). Raises: KernelError."""
    mask = struct.pack("Q", record.mask).ljust(_SIGSET_BYTES, b"\0")
    fd: int = _libc.signalfd(-1, mask, os.O_CLOEXEC | (record.flags & os.O_NONBLOCK))
    if fd < 0:
        number = ctypes.get_errno()
        raise KernelError("signalfd(2)", number, os.strerror(number))
    set_flags(fd, record.flags)
    return fd
