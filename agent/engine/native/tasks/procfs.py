"""Reading /proc/PID as the freeze needs it: opened before, read again and again with one call each."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from protocol.errors import KernelError, TaskGoneError

_GONE = frozenset({errno.ENOENT, errno.ESRCH})
_READ_BYTES = 1 << 16


@contextmanager
def task_errors(path: str) -> Iterator[None]:
    """An OSError as one of ours: the task is gone, or the kernel refused."""
    try:
        yield
    except OSError as error:
        if error.errno in _GONE:
            raise TaskGoneError(f"{path} is gone: the task ended") from error
        raise KernelError(path, error.errno or 0, error.strerror or "") from error


class ProcFile:
    """A file of procfs held open: a new read from offset 0 gives new contents.

    Raises (all methods): TaskGoneError, KernelError.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with task_errors(path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> str:
        """All of it."""
        with task_errors(self.path):
            return _read_all(self._fd).decode("utf-8", "surrogateescape")

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _read_all(fd: int) -> bytes:
    pieces = []
    offset = 0
    # procfs may give less than was asked for in the middle of a file: only an empty read is its end.
    while piece := os.pread(fd, _READ_BYTES, offset):
        pieces.append(piece)
        offset += len(piece)
    return b"".join(pieces)


def read_bytes(path: str) -> bytes:
    """A whole file of procfs. Raises: TaskGoneError, KernelError."""
    with task_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read_all(fd)
        finally:
            os.close(fd)


def read_text(path: str) -> str:
    """As `read_bytes`; bytes that are no UTF-8 come back by `os.fsencode`."""
    return read_bytes(path).decode("utf-8", "surrogateescape")


def read_link(path: str) -> str:
    """Where a link of procfs points to. Raises: TaskGoneError, KernelError."""
    with task_errors(path):
        return os.readlink(path)


def status_fields(text: str) -> dict[str, str]:
    """The lines `Name: value` of /proc/PID/status.   Source: proc_pid_status(5)."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":\t")
        found[name] = value
    return found


def stat_fields(text: str) -> list[str]:
    """The fields of /proc/PID/stat; index 0 is field 3, the state: the name before it may hold anything."""
    return text[text.rindex(")") + 2 :].split()


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat: with the pid it names a process for good. Raises: TaskGoneError."""
    return int(stat_fields(read_text(f"/proc/{pid}/stat"))[22 - 3])


def thread_ids(pid: int) -> list[int]:
    """Host tids, in ascending order. Raises: TaskGoneError."""
    path = f"/proc/{pid}/task"
    with task_errors(path):
        return sorted(int(name) for name in os.listdir(path))
