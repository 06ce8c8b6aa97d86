"""Start programs inside the namespaces of another process, as direct children of this one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# linux/sched.h
CLONE_NEWPID = 0x20000000

_LIBC = ctypes.CDLL(None, use_errno=True)

# Joins the cgroups in $1, then becomes the rest of its arguments. Writing 0 means "the writer".
_JOIN_CGROUPS = 'for d in $1; do echo 0 >"$d/cgroup.procs" || exit 125; done; shift; exec "$@"'


def _setns(fd: int, kind: int) -> None:
    if _LIBC.setns(fd, kind) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"setns: {os.strerror(errno)}")


@contextlib.contextmanager
def children_born_in(pid: int) -> Iterator[None]:
    """Children that this thread makes meanwhile live in the pid namespace of `pid`, which must lie below ours.

    So their Popen has the real process: signals and exit statuses need no helper in between.
    Source: setns(2), CLONE_NEWPID changes only where children go, and only for the calling thread.
    """
    target = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    own = os.open("/proc/thread-self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(target, CLONE_NEWPID)
        try:
            yield
        finally:
            _setns(own, CLONE_NEWPID)
    finally:
        os.close(target)
        os.close(own)


def spawn(
    args: Sequence[str],
    *,
    inside: int | None,
    enter: Sequence[str],
    cgroups: Sequence[Path],
    **popen: Any,
) -> subprocess.Popen[Any]:
    """Start `args` in the pid namespace and in the `enter` namespaces (options of nsenter) of the process `inside`.

    A session of its own keeps a Ctrl-C at our terminal away from it.
    """
    command = ["sh", "-c", _JOIN_CGROUPS, "sh", " ".join(map(str, cgroups))]
    if inside is None:
        return subprocess.Popen([*command, *args], start_new_session=True, **popen)
    command += ["nsenter", f"--target={inside}", *enter, "--", *args]
    with children_born_in(inside):
        return subprocess.Popen(command, start_new_session=True, **popen)


def pids_by_namespace(pid: int) -> list[int]:
    """The numbers of `pid`, ours first, then one for each nested pid namespace. Source: proc(5), NSpid."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return [int(word) for word in line.split()[1:]]
    raise ProcessLookupError(pid)


def only_child(pid: int) -> int:
    """The one child of `pid`. Source: proc(5), /proc/PID/task/TID/children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    if len(children) != 1:
        raise ProcessLookupError(f"process {pid} has {len(children)} children, not one")
    return int(children[0])
