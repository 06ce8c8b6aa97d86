"""A cgroup subtree per test host, in every hierarchy of the machine (v1, hybrid or v2)."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PREFIX = "migrate-lab-"
_REMOVE_TIMEOUT_S = 10.0
# Of each second, to each host: an engine asks for it in the freeze. All groups share 950 ms, so four hosts can have it.
_REAL_TIME_US = 200_000
_MAX_SHARES = 262144
_LAB_SHARES = 16384  # against 1024 of every task outside: the hosts together are two machines, not one program


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    path: Path  # where the machine has it mounted
    options: str  # what mounts it again: "memory", "cpu,cpuacct", "none,name=systemd"; "" is cgroup2

    @property
    def where(self) -> str:
        """Its place below /sys/fs/cgroup; "." for a machine with v2 alone."""
        return str(self.path.relative_to("/sys/fs/cgroup"))


def hierarchies() -> list[Hierarchy]:
    """Every cgroup mount below /sys/fs/cgroup. Source: proc(5), mountinfo."""
    found: dict[Path, Hierarchy] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ")
        path = Path(before.split()[4])
        kind, _source, options = after.split(" ", 2)
        if kind not in {"cgroup", "cgroup2"} or not path.is_relative_to("/sys/fs/cgroup"):
            continue
        wanted = [o for o in options.split(",") if o not in {"rw", "xattr", "clone_children"} and "release" not in o]
        names = [o for o in wanted if o.startswith("name=")]
        found[path] = Hierarchy(
            path=path, options="" if kind == "cgroup2" else ",".join(["none", *names] if names else wanted)
        )
    return list(found.values())


class CgroupTree:
    """The directory `name` in each hierarchy."""

    def __init__(self, name: str) -> None:
        self.hierarchies = hierarchies()
        self.directories = [h.path / name for h in self.hierarchies]

    def make(self) -> None:
        for hierarchy, directory in zip(self.hierarchies, self.directories, strict=True):
            for level in [directory.parent, directory]:
                if level == hierarchy.path or level.is_dir():
                    continue
                level.mkdir()
                # cpuset(7): a v1 cpuset starts empty, and nothing can join it.
                for name in ["cpuset.cpus", "cpuset.mems"]:
                    file = level / name
                    if not hierarchy.options or not file.exists():
                        continue
                    file.write_text((level.parent / name).read_text())
                if level == directory:
                    continue
                if (level / "cpu.shares").exists():
                    (level / "cpu.shares").write_text(str(_LAB_SHARES))
                if not hierarchy.options:
                    _enable_controllers(level)

    def grant_real_time(self) -> None:
        """Let processes in here take SCHED_FIFO; not where the groups of others have used up the machine's share.

        Source: the kernel's sched-rt-group.rst: a new group has none (CONFIG_RT_GROUP_SCHED, v1), a parent at least
        the sum of its children's.
        """
        for directory in self.directories:
            own, parents = directory / "cpu.rt_runtime_us", directory.parent / "cpu.rt_runtime_us"
            if own.exists():
                siblings = sum(int(file.read_text()) for file in directory.parent.glob(f"*/{own.name}"))
                with contextlib.suppress(OSError):
                    parents.write_text(str(siblings + _REAL_TIME_US))
                    own.write_text(str(_REAL_TIME_US))

    def prefer(self) -> None:
        """Serve processes in here before those of the other hosts."""
        for directory in self.directories:
            for name, value in [("cpu.shares", _MAX_SHARES), ("cpu.weight", 10000)]:
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    (directory / name).write_text(str(value))

    def joinable(self) -> list[Path]:
        """Where a process goes that belongs to this tree. v2: a leaf, processes and children exclude each other."""
        return [d / "init" if (d / "init").is_dir() else d for d in self.directories]

    def _walk(self) -> Iterator[Path]:
        """Every directory, children before their parents."""
        for top in self.directories:
            for directory, _dirs, _files in os.walk(top, topdown=False):
                yield Path(directory)

    def pids(self) -> set[int]:
        found: set[int] = set()
        for directory in self._walk():
            # ENODEV: the directory went away while it was read. 0: a process of a foreign pid namespace.
            with contextlib.suppress(FileNotFoundError, OSError):
                found.update(int(word) for word in (directory / "cgroup.procs").read_text().split())
        return found - {0, os.getpid()}

    def kill(self) -> None:
        """SIGKILL to all, and only then a thaw: a frozen task of v1 dies without another instruction."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for directory in self._walk():
            for name, value in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")]:
                with contextlib.suppress(OSError):
                    if (directory / name).exists():
                        (directory / name).write_text(value)

    def remove(self) -> None:
        """Raises: TimeoutError: something in it does not die."""
        deadline = time.monotonic() + _REMOVE_TIMEOUT_S
        while left := [d for d in self._walk() if not _removed(d)]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"cgroups are still in use: {left}, processes {self.pids()}")
            time.sleep(0.005)


def _removed(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False  # EBUSY: an exiting task is still in it
    return True


def _enable_controllers(directory: Path) -> None:
    available = (directory / "cgroup.controllers").read_text().split()
    (directory / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in available))
