"""epoll: every entry with its events and data. Entries are added by the process itself: their key holds the number.

Does not survive: an edge-triggered entry that is ready is reported once more; a one-shot entry that has fired reports
errors and hang-ups. Refused: entries whose descriptor was closed or replaced while a duplicate keeps them alive.
"""

from __future__ import annotations

import os
import re
import select
import struct

import msgspec

from agent.engine.native.files.base import ObjectRecord, OpenFile, Scope, Workshop, status_flags
from agent.engine.native.files.calls import is_epoll_target
from protocol.messages import Refusal

EPOLL_CTL_ADD = 1
_ENTRY = re.compile(r"^tfd: *(\d+) +events: *([0-9a-f]+) +data: *([0-9a-f]+) +pos:\S+ +ino:([0-9a-f]+)", re.MULTILINE)


class EpollEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True):
    """One watched descriptor."""

    target: int  # number in the process
    events: int
    data: int


class Epoll(ObjectRecord, frozen=True, kw_only=True, tag="epoll"):
    """The whole interest list."""

    entries: list[EpollEntry]


def matches(file: OpenFile, scope: Scope) -> bool:  # noqa: ARG001 - the interface of all kinds
    """An epoll instance."""
    return file.link == "anon_inode:[eventpoll]"


def _entries(file: OpenFile) -> list[tuple[EpollEntry, int]]:
    """Entries, and the inode of what each watches.   Source: proc_pid_fdinfo(5)."""
    return [
        (EpollEntry(target=int(target), events=int(events, 16), data=int(data, 16)), int(inode, 16))
        for target, events, data, inode in _ENTRY.findall("\n".join(file.lines))
    ]


def _stale(entries: list[tuple[EpollEntry, int]], file: OpenFile, scope: Scope) -> list[int]:
    """Numbers in the interest list that are closed, or are another open file than the one watched."""
    by_number = {number: other for other in scope.files for number, _ in other.numbers}
    stale = []
    seen: set[int] = set()
    for entry, inode in entries:
        now = by_number.get(entry.target)
        if (
            now is None
            or now.inode != inode
            or entry.target in seen
            or (not now.link.startswith("socket:[") and not is_epoll_target(scope.pid, entry.target, file.fd))
        ):
            stale.append(entry.target)
        seen.add(entry.target)
    return stale


def check(file: OpenFile, scope: Scope) -> list[Refusal]:
    """Every entry must be a descriptor that is still open."""
    stale = _stale(_entries(file), file, scope)
    if stale:
        return [scope.refusal(file, "epoll-stale", f"it watches closed descriptors that have duplicates: {stale}")]
    return []


def dump(file: OpenFile, scope: Scope) -> Epoll:
    """The interest list. Raises: UnsupportedError: a stale entry."""
    entries = _entries(file)
    stale = _stale(entries, file, scope)
    if stale:
        raise scope.refuse(file, "epoll-stale", f"it watches closed descriptors that have duplicates: {stale}")
    return Epoll(id=file.id, flags=status_flags(file.flags), entries=[entry for entry, _ in entries])


def restore(record: Epoll, workshop: Workshop) -> int:  # noqa: ARG001 - the interface of all kinds
    """An empty instance; `pack_event` and epoll_ctl in the process fill it."""
    with select.epoll() as made:
        return os.dup(made.fileno())


def pack_event(entry: EpollEntry, *, packed: bool) -> bytes:
    """struct epoll_event; `packed` on x86-64, aligned elsewhere.   Source: epoll_ctl(2)."""
    return struct.pack("<IQ" if packed else "<IxxxxQ", entry.events, entry.data)
