"""What the runtime gave the container as standard input, output and error: the target's runtime gives its own.

Does not survive: what the source's runtime had not read of the output stays in the source's log; a terminal.
"""

from __future__ import annotations

import os
import stat

from agent.engine.native.files.base import ObjectRecord, OpenFile, Scope, Workshop, set_flags, status_flags
from protocol.errors import UnsupportedError
from protocol.messages import Refusal

ROLES = ("stdin", "stdout", "stderr")
# Objects with names that look like paths, on mounts of the kernel's own.
_MEMORY = ("/memfd:", "/dmabuf:", "/SYSV", "/anon_hugepage", "/dev/zero (deleted)", "/[aio]")


class ExternalStdio(ObjectRecord, frozen=True, kw_only=True, tag="stdio"):
    """Stands for what is open under number `role` of the process that the target's runtime started."""

    role: int


def role_of(file: OpenFile, scope: Scope) -> int | None:
    """0, 1 or 2: by being that very open file, else by being the same object in the same direction."""
    standard = {number: other for other in scope.files for number, _ in other.numbers if number < len(ROLES)}
    for number, other in sorted(standard.items()):
        if other is file:
            return number
    for number, other in sorted(standard.items()):
        if identity(other) == identity(file):
            return number
    return None


def identity(file: OpenFile) -> tuple[int, int, int]:
    """What makes two open files lead to one object, in one direction."""
    return file.status.st_dev, file.status.st_ino, file.access


def check_outside(file: OpenFile, scope: Scope) -> list[Refusal]:
    """For an open file whose other end is outside the container. A terminal is refused, and so is all but stdio."""
    if stat.S_ISCHR(file.status.st_mode) and file.link.startswith(("/dev/pts/", "/dev/console", "/dev/tty")):
        return [scope.refusal(file, "terminal", "a terminal of the host", "start the container without a terminal")]
    if role_of(file, scope) is None:
        return [
            scope.refusal(
                file,
                "external-file",
                "its other end is outside the container, and it is none of the runtime's stdin, stdout and stderr",
            )
        ]
    return []


def dump_outside(file: OpenFile, scope: Scope) -> ExternalStdio:
    """The role. Raises: UnsupportedError: it has none."""
    refusals = check_outside(file, scope)
    role = role_of(file, scope)
    if refusals or role is None:
        raise UnsupportedError(refusals[0].message, code=refusals[0].code, hint=refusals[0].hint)
    return ExternalStdio(id=file.id, flags=status_flags(file.flags), role=role)


def matches(file: OpenFile, scope: Scope) -> bool:
    """Anything with a path that the container's mounts do not have."""
    return file.link.startswith("/") and not file.link.startswith(_MEMORY) and scope.is_outside(file)


check = check_outside
dump = dump_outside


def restore(record: ExternalStdio, workshop: Workshop) -> int:
    """Our duplicate of what the target's runtime gave. Raises: UnsupportedError: it gave nothing."""
    given = workshop.stdio.get(record.role)
    if given is None:
        raise UnsupportedError(
            f"the target's runtime gave the container no {ROLES[record.role]}, the source's did", code="stdio-missing"
        )
    fd = os.dup(given)
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        # The program set it and will go by it; a log file or /dev/null has no use for it.
        set_flags(fd, record.flags & os.O_NONBLOCK)
    return fd
