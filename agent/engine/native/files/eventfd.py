"""eventfd: its count and whether it is a semaphore.

Does not survive: (everything does).
"""

from __future__ import annotations

import os

from agent.engine.native.files.base import ObjectRecord, OpenFile, Scope, Workshop, set_flags, status_flags
from protocol.messages import Refusal


class EventFd(ObjectRecord, frozen=True, kw_only=True, tag="eventfd"):
    """A counter of 64 bits."""

    count: int
    semaphore: bool


def matches(file: OpenFile, scope: Scope) -> bool:  # noqa: ARG001 - the interface of all kinds
    """An eventfd."""
    return file.link == "anon_inode:[eventfd]"


def check(file: OpenFile, scope: Scope) -> list[Refusal]:
    """Refused only where the kernel does not say whether it is a semaphore (before 6.5)."""
    if "eventfd-semaphore" not in file.fields():
        return [scope.refusal(file, "eventfd", "this kernel does not say whether it is a semaphore")]
    return []


def dump(file: OpenFile, scope: Scope) -> EventFd:  # noqa: ARG001 - the interface of all kinds
    """Source: proc_pid_fdinfo(5)."""
    fields = file.fields()
    return EventFd(
        id=file.id,
        flags=status_flags(file.flags),
        count=int(fields["eventfd-count"], 16),
        semaphore=fields["eventfd-semaphore"] == "1",
    )


def restore(record: EventFd, workshop: Workshop) -> int:  # noqa: ARG001 - the interface of all kinds
    """Make it and count it up.   Source: eventfd(2)."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | (os.EFD_SEMAPHORE if record.semaphore else 0))
    if record.count:
        os.eventfd_write(fd, record.count)
    set_flags(fd, record.flags)
    return fd
