"""System V IPC: objects of the container's IPC namespace.

Does not survive: shared memory segments, semaphores and message queues; a container that has one is refused.
"""

from __future__ import annotations

import os

from agent.kernel import procfs
from agent.kernel.namespaces import Namespace, setns
from protocol.messages import Refusal

_KINDS = {"shm": "shared memory segments", "sem": "semaphore sets", "msg": "message queues"}


def check(pid: int) -> list[Refusal]:
    """Refuse every kind that has an object. Raises: TaskGoneError, KernelError."""
    return [
        Refusal(
            code="system-v-ipc",
            object=name,
            message=f"the container has {count} System V {name}, which are not carried",
        )
        for kind, name in _KINDS.items()
        if (count := _count(pid, kind))
    ]


def _count(pid: int, kind: str) -> int:
    """/proc/sysvipc shows the namespace of who opens it."""
    if procfs.read_link(f"/proc/{pid}/ns/ipc") == procfs.read_link("/proc/thread-self/ns/ipc"):
        return 0  # shared with the host: no object is the container's own
    home = os.open("/proc/thread-self/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
    there = -1
    try:
        there = os.open(f"/proc/{pid}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
        setns(there, Namespace.IPC)
        try:
            return len(procfs.read_proc(f"/proc/sysvipc/{kind}").splitlines()) - 1
        finally:
            setns(home, Namespace.IPC)
    finally:
        os.close(home)
        if there >= 0:
            os.close(there)
