"""This thread with the root directory of a container, for calls that take a path and nothing else, as bind(2) does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from agent.kernel.syscalls import os_failure, syscall
from agent.kernel.unistd import SYS

_CLONE_FS = 0x200  # linux/sched.h


@contextmanager
def inside_root(root_fd: int, directory_fd: int | None = None) -> Iterator[None]:
    """Absolute paths and links lead inside `root_fd`; relative ones begin at `directory_fd`, or at the root.

    Only this thread: its root is made its own first.
    Raises: KernelError.   Source: chroot(2), unshare(2) CLONE_FS.
    """
    syscall(SYS.unshare, _CLONE_FS, name="unshare(CLONE_FS)")
    home_root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    home = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _enter(root_fd, root_fd if directory_fd is None else directory_fd)
        try:
            yield
        finally:
            _enter(home_root, home)
    finally:
        os.close(home)
        os.close(home_root)


def _enter(root_fd: int, directory_fd: int) -> None:
    try:
        os.fchdir(root_fd)
        os.chroot(".")
        os.fchdir(directory_fd)
    except OSError as error:
        raise os_failure("chroot", error) from error
