"""Which processes belong to a container. Records carry a task number, so that a tree can come.

Survives: one process, the container's init, with its pid.
Does not survive: child processes, and sessions that were entered from outside (refused).
"""

from __future__ import annotations

import os
from pathlib import Path

from agent.kernel import procfs
from protocol.errors import TaskGoneError
from protocol.messages import Refusal

# The number of the container's init; its relatives will follow.
INIT_TASK = 0


def processes_of(init_pid: int) -> list[int]:
    """Host pids of everything in the pid namespace of `init_pid`, the init first.

    A child of the init, and a session that the runtime entered from outside. Raises: TaskGoneError.
    """
    wanted = procfs.read_link(f"/proc/{init_pid}/ns/pid")
    found = [init_pid]
    if wanted == procfs.read_link("/proc/self/ns/pid"):
        # It shares our namespace (a test, or a runtime told so): its descendants are what is its own.
        for pid in found:
            found += procfs.children(pid)
        return found
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != init_pid:
            try:
                if Path(f"/proc/{entry}/ns/pid").readlink().as_posix() == wanted:
                    found.append(int(entry))
            except OSError:
                continue  # it has ended
    return found


def check(init_pid: int) -> list[Refusal]:
    """Refuse more than one process."""
    refusals = []
    for pid in processes_of(init_pid)[1:]:
        try:
            status = procfs.read_status(pid)
        except TaskGoneError:
            continue
        own = status.ns_pid[-1]
        refusals.append(
            Refusal(
                code="process-tree", pid=own, object=status.name,
                message=f"process {own} ({status.name}) runs beside the container's init; one is carried so far",
                hint="" if status.ppid else "a session entered from outside (exec, health check) must end first",
            )
        )  # fmt: skip
    return refusals
