"""Freezing every task of a process's control group: a stop that outlives whoever asked for it.

Version 1 has a freezer controller (freezer.state), version 2 has cgroup.freeze. Source: cgroups(7),
Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst, cgroup-v2.rst.
"""

from __future__ import annotations

import enum
import errno
import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.kernel.procfs import read_proc
from agent.kernel.syscalls import os_failure
from agent.kernel.types import Pid, Tid
from protocol.errors import KernelError, TaskGoneError, UnsupportedError

_POLL_S = 0.0002  # version 1 has no event for FROZEN


class Version(enum.IntEnum):
    V1 = 1
    V2 = 2


@dataclass(frozen=True, slots=True)
class _Mount:
    root: str  # the group that stands at `point`, as our cgroup namespace names it
    point: str
    version: Version


@dataclass(frozen=True, slots=True)
class Freezer:
    """The freezer of one control group, at its directory."""

    path: Path
    version: Version

    @classmethod
    def of(cls, pid: int) -> Freezer:
        """The group that `pid` is in.

        Raises: TaskGoneError. UnsupportedError: it is in a root group, in our own group, or the group is not mounted.
        """
        groups = _groups(pid)
        own = _groups(os.getpid())
        mounts = _mounts()
        for version in (Version.V1, Version.V2):
            group = groups.get(version)
            # A group that holds us too (the root at least) would freeze us with it.
            if group is None or group == "/" or own.get(version, "") == group:
                continue
            for mount in reversed(mounts):
                if mount.version is not version or (below := _below(group, mount.root)) is None:
                    continue
                path = Path(mount.point + below)
                if (path / _CONTROL[version]).exists():
                    return cls(path, version)
        raise UnsupportedError(
            f"process {pid} is in no control group of its own that can be frozen (groups {groups or 'none'})",
            hint="let the runtime make a cgroup for the container, and mount the freezer controller or cgroup2",
        )

    @classmethod
    def at(cls, paths: Sequence[str]) -> Freezer:
        """The group that `paths` named before. Raises: TaskGoneError: it is gone, and so are its tasks."""
        (path,) = map(Path, paths)
        for version in (Version.V1, Version.V2):
            if (path / _CONTROL[version]).exists():
                return cls(path, version)
        raise TaskGoneError(f"the control group {path} is gone")

    @property
    def paths(self) -> list[str]:
        """For `at`, in another process and after a restart."""
        return [str(self.path)]

    def freeze(self) -> None:
        """Ask for it; `wait_frozen` waits. Raises: KernelError."""
        self._write("FROZEN" if self.version is Version.V1 else "1")

    def thaw(self) -> None:
        """Tasks run again when it returns, or a moment later. Raises: KernelError."""
        self._write("THAWED" if self.version is Version.V1 else "0")

    def is_frozen(self) -> bool:
        """Whether every task of the group and the groups below has stopped. Raises: KernelError."""
        if self.version is Version.V1:
            return self._read("freezer.state").strip() == "FROZEN"
        return "frozen 1" in self._read("cgroup.events").splitlines()

    def wait_frozen(self, timeout_s: float) -> None:
        """Raises: KernelError: ETIMEDOUT, with the tasks that run on."""
        deadline = time.monotonic() + timeout_s
        if self.version is Version.V2:
            self._wait_event(deadline)
        while not self.is_frozen():
            if time.monotonic() > deadline:
                raise KernelError(
                    f"freeze({self.path})", errno.ETIMEDOUT, f"not all of tasks {self.tasks()} stopped in {timeout_s} s"
                )
            time.sleep(_POLL_S)

    def tasks(self) -> list[Tid]:
        """Every thread in the group and in the groups below it. Raises: KernelError."""
        name = "tasks" if self.version is Version.V1 else "cgroup.threads"
        found: set[int] = set()
        for directory, _, _ in os.walk(self.path):
            found |= set(map(int, self._read_file(Path(directory) / name).split()))
        return [Tid(number) for number in sorted(found)]

    def processes(self) -> list[Pid]:
        """Every process in the group and in the groups below it. Raises: KernelError."""
        found: set[int] = set()
        for directory, _, _ in os.walk(self.path):
            found |= set(map(int, self._read_file(Path(directory) / "cgroup.procs").split()))
        return [Pid(number) for number in sorted(found)]

    def _wait_event(self, deadline: float) -> None:
        path = self.path / "cgroup.events"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise os_failure(f"open({path})", error) from error
        try:
            poller = select.poll()
            poller.register(descriptor, select.POLLPRI)
            while b"frozen 1" not in os.pread(descriptor, 256, 0):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return
                poller.poll(left_s * 1000)
        finally:
            os.close(descriptor)

    def _write(self, text: str) -> None:
        path = self.path / _CONTROL[self.version]
        try:
            path.write_text(text, encoding="ascii")
        except OSError as error:
            raise os_failure(f"write({path}, {text})", error) from error

    def _read(self, name: str) -> str:
        return self._read_file(self.path / name)

    @staticmethod
    def _read_file(path: Path) -> str:
        try:
            return path.read_text(encoding="ascii")
        except OSError as error:
            raise os_failure(f"read({path})", error) from error


class OpenFreezer:
    """A freezer whose files are open already: in a freeze of milliseconds to open them is a tenth of it. Close it.

    Raises (all methods): KernelError.
    """

    def __init__(self, freezer: Freezer) -> None:
        self._freezer = freezer
        self._control = _open(freezer.path / _CONTROL[freezer.version], os.O_RDWR)
        try:
            state = _STATE[freezer.version]
            self._state = _open(freezer.path / state, os.O_RDONLY)
        except KernelError:
            os.close(self._control)
            raise

    def freeze(self) -> None:
        """As `Freezer.freeze`."""
        self._write(b"FROZEN" if self._freezer.version is Version.V1 else b"1")

    def thaw(self) -> None:
        """As `Freezer.thaw`."""
        self._write(b"THAWED" if self._freezer.version is Version.V1 else b"0")

    def wait_frozen(self, timeout_s: float) -> None:
        """As `Freezer.wait_frozen`."""
        wanted = b"FROZEN" if self._freezer.version is Version.V1 else b"frozen 1"
        try:
            if os.pread(self._state, 256, 0).find(wanted) < 0:
                self._freezer.wait_frozen(timeout_s)
        except OSError as error:
            raise os_failure(f"read({self._freezer.path})", error) from error

    def close(self) -> None:
        """Idempotent."""
        if self._control >= 0:
            os.close(self._control)
            os.close(self._state)
            self._control = self._state = -1

    def _write(self, text: bytes) -> None:
        try:
            os.pwrite(self._control, text, 0)
        except OSError as error:
            raise os_failure(f"write({self._freezer.path}, {text!r})", error) from error


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise os_failure(f"open({path})", error) from error


def versions() -> list[Version]:
    """The freezers that this host has mounted, best first."""
    return sorted({mount.version for mount in _mounts()})


_CONTROL = {Version.V1: "freezer.state", Version.V2: "cgroup.freeze"}
_STATE = {Version.V1: "freezer.state", Version.V2: "cgroup.events"}


def _groups(pid: int) -> dict[Version, str]:
    """The groups that matter here. A path that begins with /.. is above our cgroup namespace's root."""
    found: dict[Version, str] = {}
    for line in os.fsdecode(read_proc(f"/proc/{pid}/cgroup")).splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if "freezer" in controllers.split(","):
            found[Version.V1] = path
        elif hierarchy == "0" and not controllers:
            found[Version.V2] = path
    return found


def _mounts() -> list[_Mount]:
    found = []
    for line in os.fsdecode(read_proc("/proc/self/mountinfo")).splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        root, point = (_unescape(text) for text in left.split(" ")[3:5])
        if kind == "cgroup2":
            found.append(_Mount(root, point, Version.V2))
        elif kind == "cgroup" and "freezer" in options.split(" ")[-1].split(","):
            found.append(_Mount(root, point, Version.V1))
    return found


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _below(group: str, root: str) -> str | None:
    """The group's path below a mount whose root is the group `root`; None when it is not below it."""
    if root == "/":
        return None if group.startswith("/..") else group
    if group == root or group.startswith(f"{root}/"):
        return group[len(root) :]
    return None
