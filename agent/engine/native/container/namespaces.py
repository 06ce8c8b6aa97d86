"""Namespaces: made by the target's own runtime, from the same config.json.

Survives: everything that config.json describes; process and thread ids.
Does not survive: namespaces that the program made itself, below the container's (refused); a host name that it changed.
"""

from __future__ import annotations

from agent.kernel import procfs
from protocol.messages import Refusal

_KINDS = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
_FOR_CHILDREN = ("pid", "time")


def check(pid: int, container_pid: int) -> list[Refusal]:
    """Refuse threads that live in other namespaces than the init, or whose children would.

    Raises: TaskGoneError.
    """
    own = {kind: procfs.read_link(f"/proc/{pid}/ns/{kind}") for kind in _KINDS}
    found = {
        kind
        for tid in procfs.task_ids(pid)
        for kind in _KINDS
        if procfs.read_link(f"/proc/{pid}/task/{tid}/ns/{kind}") != own[kind]
    }
    found |= {kind for kind in _FOR_CHILDREN if procfs.read_link(f"/proc/{pid}/ns/{kind}_for_children") != own[kind]}
    return [
        Refusal(
            code="namespace",
            pid=container_pid,
            object=f"{kind} namespace",
            message=f"process {container_pid} has made a {kind} namespace of its own, which is not carried",
        )
        for kind in sorted(found)
    ]
