"""The descriptor table of a process, read from outside: which numbers there are and which share one open file."""

from __future__ import annotations

import os

from agent.engine.native.files.base import OpenFile, Scope
from agent.engine.native.files.calls import Comparer, Order, read_proc

_COMMON_LINES = frozenset({"pos", "flags", "mnt_id", "ino"})


class _SameLooking:
    """Open files that look alike (all eventfds do), kept in kcmp's order so that a thousand need 10,000 compares."""

    def __init__(self, pid: int, comparer: Comparer) -> None:
        self._pid = pid
        self._compare = comparer.compare
        self._sorted: list[OpenFile] = []

    def find_or_add(self, file: OpenFile) -> OpenFile:
        low, high = 0, len(self._sorted)
        while low < high:
            middle = (low + high) // 2
            order = self._compare(self._pid, file.fd, self._pid, self._sorted[middle].fd)
            if order is Order.SAME:
                return self._sorted[middle]
            if order is Order.LESS:
                high = middle
            else:
                low = middle + 1
        self._sorted.insert(low, file)
        return file


def list_numbers(pid: int) -> list[int]:
    """The open numbers, ascending."""
    return sorted(map(int, os.listdir(f"/proc/{pid}/fd")))


def parse_fdinfo(text: str) -> tuple[dict[str, str], list[str]]:
    """The common lines by name, and all others.   Source: proc_pid_fdinfo(5)."""
    common = {}
    others = []
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in _COMMON_LINES and name not in common:
            common[name] = value.strip()
        else:
            others.append(line)
    return common, others


def read_open_file(pid: int, number: int) -> tuple[OpenFile, bool]:
    """What is behind one number, and whether it is close-on-exec. Raises: FileNotFoundError: not open (any more)."""
    path = f"/proc/{pid}/fd/{number}"
    common, others = parse_fdinfo(read_proc(f"/proc/{pid}/fdinfo/{number}"))
    flags = int(common["flags"], 8)
    file = OpenFile(
        id=number,
        fd=number,
        link=os.readlink(path),
        flags=flags & ~os.O_CLOEXEC,
        offset=int(common["pos"]),
        mount_id=int(common["mnt_id"]),
        lines=others,
        status=os.stat(path),
    )
    return file, bool(flags & os.O_CLOEXEC)


def read_table(scope: Scope) -> list[OpenFile]:
    """Every open file of the process, by lowest number; ids are those numbers.

    A number that is closed while we look (nothing is stopped in `check`) is left out.
    """
    files: list[OpenFile] = []
    sockets: dict[str, OpenFile] = {}
    alike: dict[tuple[str, int, int], _SameLooking] = {}
    for number in list_numbers(scope.pid):
        try:
            file, cloexec = read_open_file(scope.pid, number)
        except FileNotFoundError:
            continue
        if file.link.startswith("socket:["):
            # A socket cannot be opened by path: one inode is one open file.
            first = sockets.setdefault(file.link, file)
        else:
            bucket = alike.setdefault((file.link, file.flags, file.offset), _SameLooking(scope.pid, scope.comparer))
            first = bucket.find_or_add(file)
        if first is file:
            files.append(file)
        first.numbers.append((number, cloexec))
    return files
