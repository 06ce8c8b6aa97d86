"""Opening a path of a container without leaving its root. Source: openat2(2) (Linux 5.6)."""

from __future__ import annotations

import os
import struct

from agent.kernel.syscalls import os_failure, syscall
from agent.kernel.types import Fd
from agent.kernel.unistd import SYS

# linux/openat2.h
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10
RESOLVE_CACHED = 0x20

SAFE_FLAGS = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


def openat2(directory: int, path: str | bytes, flags: int, *, mode: int = 0, resolve: int) -> Fd:
    """Raises: KernelError."""
    how = struct.pack("=QQQ", flags, mode, resolve)
    raw = os.fsencode(path)
    return Fd(syscall(SYS.openat2, directory, raw, how, len(how), name=f"openat2({os.fsdecode(raw)!r})"))


def open_in_root(root: int, path: str | bytes, flags: int = os.O_RDONLY, mode: int = 0) -> Fd:
    """Open `path` as a process with root directory `root` would, and never outside it.

    O_CLOEXEC, O_NOCTTY and O_NONBLOCK are added (no fifo or terminal holds us up); a restored file's own flags are
    set afterwards. Symbolic links are followed inside the root; add O_NOFOLLOW where the last must be none.
    Raises: KernelError.
    """
    extra = os.O_CLOEXEC if flags & os.O_PATH else SAFE_FLAGS
    return openat2(root, path, flags | extra, mode=mode, resolve=RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)


def open_root_of(pid: int) -> Fd:
    """An O_PATH descriptor of a process's root directory."""
    path = f"/proc/{pid}/root"
    try:
        return Fd(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        raise os_failure(f"open({path})", error) from error
