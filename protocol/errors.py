"""The one error tree, cut by what an operator can do about it.

Every error carries a stable `code` (a slug that tests, playbooks and `--json` rely on), the host it happened on
where that is known, and a hint that says what to do next.
"""

from __future__ import annotations


class MigrateError(Exception):
    """Base of all errors that a person may see."""

    code = "internal"
    exit_status = 1

    def __init__(self, message: str, *, code: str | None = None, host: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.host = host
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        where = f"{self.host}: " if self.host else ""
        advice = f" ({self.hint})" if self.hint else ""
        return f"{where}{self.message}{advice}"


class UsageError(MigrateError):
    """The request itself makes no sense: bad arguments, a bad inventory."""

    code = "usage"
    exit_status = 2


class UnsupportedError(MigrateError):
    """Refused before anything was touched."""

    code = "unsupported"
    exit_status = 3


class PeerError(MigrateError):
    """A host cannot be reached, or refused us."""

    code = "unreachable"
    exit_status = 4


class RolledBackError(MigrateError):
    """The migration failed and was undone: the container runs on the source."""

    code = "rolled-back"
    exit_status = 5


class InDoubtError(MigrateError):
    """The two sides cannot agree by themselves: a person must run `migrate recover`."""

    code = "in-doubt"
    exit_status = 6


class NotConvergedError(MigrateError):
    """Out of rounds, out of time or over the freeze budget; the container runs on the source."""

    code = "not-converged"
    exit_status = 7


class AbortedError(MigrateError):
    """Ended because somebody asked for it; the container runs on the source."""

    code = "aborted"
    exit_status = 8


class KernelError(MigrateError):
    """A system call failed.

    `call` names it with the arguments that matter; `errno` is the number the kernel gave.
    """

    code = "kernel"

    def __init__(self, call: str, errno: int, text: str = "", *, hint: str = "") -> None:
        super().__init__(f"{call}: {text or f'errno {errno}'}", hint=hint)
        self.call = call
        self.errno = errno


class TaskGoneError(MigrateError):
    """A process or thread died, or is traced by somebody else, while we worked on it."""

    code = "task-gone"


class BusyError(MigrateError):
    """The container is locked by another migration."""

    code = "busy"
    exit_status = 3


class ProtocolError(MigrateError):
    """Base of what the sans-IO connection raises."""

    code = "protocol"


class LocalProtocolError(ProtocolError):
    """We tried to send what must not be sent: a bug of ours."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what must not be sent; the connection is of no more use."""


_BY_CODE: dict[str, type[MigrateError]] = {
    error.code: error
    for error in (
        UsageError, UnsupportedError, PeerError, RolledBackError, InDoubtError, NotConvergedError,
        AbortedError, BusyError, TaskGoneError, ProtocolError,
    )
}  # fmt: skip


def error_from_wire(*, family: str, code: str, message: str, host: str, hint: str) -> MigrateError:
    """Rebuild an error that a peer reported. An unknown family becomes a plain MigrateError."""
    return _BY_CODE.get(family, MigrateError)(message, code=code, host=host, hint=hint)


def family_of(error: MigrateError) -> str:
    """The code of the class that decides the exit status, for the wire."""
    for cls in type(error).__mro__:
        own = cls.__dict__.get("code")
        if isinstance(own, str) and own in _BY_CODE:
            return own
    return MigrateError.code
