"""A file of /proc/PID that is read again and again: opened before the freeze, then one call a look."""

from __future__ import annotations

import errno
import os

from agent.kernel.syscalls import failure, os_failure
from protocol.errors import MigrateError

_GONE = frozenset({errno.ENOENT, errno.ESRCH})
_READ_BYTES = 1 << 16


class ProcFile:
    """Held open; a read from offset 0 gives new contents.

    Raises (all methods): TaskGoneError, KernelError.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._error("open", error) from error

    def read(self) -> bytes:
        """All of it."""
        pieces = []
        offset = 0
        try:
            # procfs may give less than was asked for in the middle of a file: only an empty read is its end.
            while piece := os.pread(self._fd, _READ_BYTES, offset):
                pieces.append(piece)
                offset += len(piece)
        except OSError as error:
            raise self._error("read", error) from error
        return b"".join(pieces)

    def _error(self, call: str, error: OSError) -> MigrateError:
        if error.errno in _GONE:
            return failure(f"{call}({self.path})", errno.ESRCH, "the task ended")
        return os_failure(f"{call}({self.path})", error)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
