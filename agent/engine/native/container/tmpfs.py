"""File systems in memory that are the container's own: /dev/shm, /run, /tmp where config.json says tmpfs.

Survives: the mounts themselves, made by the target's runtime.
Does not survive: files in them (refused).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from agent.kernel import openat2, procfs
from protocol.errors import KernelError
from protocol.messages import Refusal

_DEV = "/dev"
# Enough to find a file; a tree larger than this has one.
_MAX_ENTRIES = 10000


@dataclass(frozen=True, slots=True)
class _Mount:
    point: str
    root: str
    kind: str


def check(pid: int) -> list[Refusal]:
    """Refuse a tmpfs with a file in it. Raises: TaskGoneError, KernelError."""
    root = openat2.open_root_of(pid)
    try:
        return [
            Refusal(
                code="tmpfs-contents", object=f"{mount.point}: {name}",
                message=f"the container's tmpfs {mount.point} holds files ({name}), which are not carried yet",
                hint="keep them on the root file system, or empty the tmpfs",
            )
            for mount in _mounts(pid)
            if mount.kind == "tmpfs" and mount.root == "/" and (name := _first_file(root, mount.point))
        ]  # fmt: skip
    finally:
        os.close(root)


def _mounts(pid: int) -> list[_Mount]:
    """Source: proc_pid_mountinfo(5)."""
    found = []
    for line in os.fsdecode(procfs.read_proc(f"/proc/{pid}/mountinfo")).splitlines():
        left, _, right = line.partition(" - ")
        words = left.split(" ")
        found.append(_Mount(point=words[4], root=words[3], kind=right.split(" ", 1)[0]))
    return found


def _first_file(root: int, point: str) -> str:
    """The path of a file below the mount point; '' : none. Nodes that runtimes put into /dev are none."""
    try:
        top = openat2.open_in_root(root, point, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK)
    except KernelError:
        return ""  # a mount under another, or of a single file
    try:
        device = os.fstat(top).st_dev
        entries = 0
        for folder, _, names, folder_fd in os.fwalk(".", dir_fd=top, follow_symlinks=False):
            if os.fstat(folder_fd).st_dev != device:
                continue
            for name in names:
                entries += 1
                mode = os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mode
                if stat.S_ISREG(mode) or (entries > _MAX_ENTRIES) or (point != _DEV and not stat.S_ISDIR(mode)):
                    return f"{folder}/{name}".removeprefix("./")
        return ""
    finally:
        os.close(top)
