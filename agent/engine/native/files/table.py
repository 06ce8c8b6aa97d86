"""The descriptor table of a process, read from outside: which numbers there are and which share one open file."""

from __future__ import annotations

import errno
import os

from agent.engine.native.files.base import OpenFile, Scope
from agent.engine.native.files.calls import Order, compare_open_files, is_same_open_file, read_small
from agent.kernel.procfs import descriptors, parse_fdinfo
from protocol.errors import KernelError


class _SameLooking:
    """Open files that look alike (all eventfds do), kept in kcmp's order so that a thousand need 10,000 compares."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._sorted: list[OpenFile] = []

    def find_or_add(self, file: OpenFile) -> OpenFile:
        low, high = 0, len(self._sorted)
        while low < high:
            middle = (low + high) // 2
            order = compare_open_files(self._pid, file.fd, self._pid, self._sorted[middle].fd)
            if order is Order.SAME:
                return self._sorted[middle]
            if order is Order.LESS:
                high = middle
            else:
                low = middle + 1
        self._sorted.insert(low, file)
        return file


def read_open_file(pid: int, number: int) -> tuple[OpenFile, bool]:
    """What is behind one number, and whether it is close-on-exec. Raises: FileNotFoundError: not open (any more)."""
    path = f"/proc/{pid}/fd/{number}"
    info = parse_fdinfo(read_small(f"/proc/{pid}/fdinfo/{number}"))
    file = OpenFile(
        id=number,
        fd=number,
        link=os.readlink(path),
        flags=info.flags & ~os.O_CLOEXEC,
        offset=info.position,
        mount_id=info.mount_id,
        lines=list(info.lines),
        status=os.stat(path),
    )
    return file, bool(info.flags & os.O_CLOEXEC)


class TableReader:
    """Builds the list of open files of a process, number by number."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self.files: list[OpenFile] = []
        self._sockets: dict[str, OpenFile] = {}
        self._alike: dict[tuple[str, int, int], _SameLooking] = {}

    def add(self, file: OpenFile, number: int, *, cloexec: bool) -> None:
        """One number and what is behind it."""
        if file.link.startswith("socket:["):
            # A socket cannot be opened by path: one inode is one open file.
            first = self._sockets.setdefault(file.link, file)
        else:
            key = (file.link, file.flags, file.offset)
            alike = self._alike.setdefault(key, _SameLooking(self._scope.pid))
            first = alike.find_or_add(file)
        if first is file:
            self.files.append(file)
        first.numbers.append((number, cloexec))


def read_table(scope: Scope) -> list[OpenFile]:
    """Every open file of the process, by lowest number; ids are those numbers.

    A number that is closed while we look (nothing is stopped in `check`) is left out.
    """
    while True:
        reader = TableReader(scope)
        try:
            for number in descriptors(scope.pid):
                try:
                    file, cloexec = read_open_file(scope.pid, number)
                except FileNotFoundError:
                    continue
                reader.add(file, number, cloexec=cloexec)
        except KernelError as error:
            if error.errno != errno.EBADF:  # closed between two looks at it: look again
                raise
            continue
        return reader.files


def reread_table(scope: Scope, before: list[OpenFile]) -> list[OpenFile]:
    """The same in the freeze: a socket that is held and still under its number is not looked up again.

    What is not there any more or is another object is let go of, so that closing it means what it says.
    """
    known = {number: file for file in before for number, _ in file.numbers}
    own_pid = os.getpid()
    reader = TableReader(scope)
    kept: set[int] = set()
    for number in descriptors(scope.pid):
        old = known.get(number)
        held = scope.held_socket(old.inode) if old is not None else None
        if old is not None and held is not None and is_same_open_file(scope.pid, number, own_pid, held.sock.fileno()):
            flags = read_flags(scope.pid, number)
            file = old.at(number, flags & ~os.O_CLOEXEC)
            kept.add(old.inode)
            reader.add(file, number, cloexec=bool(flags & os.O_CLOEXEC))
        else:
            file, cloexec = read_open_file(scope.pid, number)
            reader.add(file, number, cloexec=cloexec)
    for old in before:
        if old.inode not in kept:
            scope.let_go_of_socket(old.inode)
    return reader.files


def read_flags(pid: int, number: int) -> int:
    r"""Flags with O_CLOEXEC: the second line of fdinfo, `flags:\tOCTAL`."""
    text = read_small(f"/proc/{pid}/fdinfo/{number}")
    start = text.index(b"flags:") + 6
    return int(text[start : text.index(b"\n", start)], 8)
