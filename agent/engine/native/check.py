"""Everything that stands in the way of moving a container, found while it runs; nothing is stopped or changed."""

from __future__ import annotations

from dataclasses import dataclass

from agent.engine.native import files, tree
from agent.engine.native.registry import RESOURCES, CheckContext
from agent.engine.native.tasks import memory
from agent.kernel import procfs
from protocol.messages import Refusal

# Page tables for a watched reserve take 1/512 of it; above this that is worth a word.
_LARGE_RESERVE_BYTES = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """`files`: paths inside the container of the program, of what is mapped and of what is open for reading."""

    refusals: list[Refusal]
    warnings: list[str]
    files: list[str]
    processes: int
    threads: int
    memory_bytes: int  # resident
    mapped_bytes: int
    connections: int


def check_container(pid: int, *, storage: str = "none", tcp: str = "keep", network: str = "keep") -> Check:
    """Ask every resource. `pid`: host pid of the container's init.

    Raises: TaskGoneError: the container has ended. KernelError.
    """
    status = procfs.read_status(pid)
    context = CheckContext(pid=pid, container_pid=status.ns_pid[-1], storage=storage, tcp=tcp, network=network)
    refusals = [refusal for resource in RESOURCES for refusal in resource.check(context)]
    opened = files.check(files.CheckContext(pid=pid, tcp_mode=tcp, storage=storage))
    refusals += opened.refusals
    lines = procfs.read_maps(pid)
    paths = {
        line.path
        for line in lines
        if line.is_file
        and not line.deleted
        and line.path.startswith("/")
        and not (line.is_shared and line.protection & 2)
    }
    paths.add(procfs.read_link(f"/proc/{pid}/exe"))
    # A refused one cannot be opened by its path; it has been named already.
    paths = {
        path for path in paths if not path.endswith(" (deleted)") and not path.startswith(("/memfd:", "/SYSV", "/["))
    }
    mapped_bytes = sum(line.size_bytes for line in lines if memory.is_tracked(line) and line.protection)
    warnings = list(opened.warnings)
    if mapped_bytes > _LARGE_RESERVE_BYTES:
        warnings.append(
            f"{mapped_bytes >> 30} GiB are mapped: watching them takes {mapped_bytes >> 39} GiB of page tables"
        )
    return Check(
        refusals=refusals, warnings=warnings, files=sorted(paths | set(opened.paths)),
        processes=len(tree.processes_of(pid)), threads=status.threads, memory_bytes=status.rss_bytes,
        mapped_bytes=mapped_bytes, connections=opened.connections,
    )  # fmt: skip
