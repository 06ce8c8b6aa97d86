"""Errors of the coordinator that the shared tree does not have."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.errors import AbortedError, MigrateError, PeerError, UnsupportedError, error_from_wire, family_of
from protocol.messages import Failure, Refusal


class RefusedError(UnsupportedError):
    """Not feasible, with every reason at once; nothing was touched."""

    def __init__(self, refusals: Sequence[Refusal], *, host: str = "", hint: str = "") -> None:
        first = refusals[0]
        more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
        super().__init__(first.message + more, code=first.code, host=first.host or host, hint=first.hint or hint)
        self.refusals = tuple(refusals)


class LinkLostError(PeerError):
    """The connection to an agent ended while an answer was waited for: what became of the request is not known."""


class InterruptedByUserError(AbortedError):
    """Ctrl-C or SIGTERM at the coordinator; the container runs on the source."""

    exit_status = 130


def error_from_failure(failure: Failure, host: str) -> MigrateError:
    """The error that an agent reported, with its refusals."""
    where = failure.host or host
    if failure.refusals and failure.family == UnsupportedError.code:
        return RefusedError(failure.refusals, host=where, hint=failure.hint)
    return error_from_wire(
        family=failure.family, code=failure.code, message=failure.message, host=where, hint=failure.hint
    )


def failure_of(error: MigrateError) -> Failure:
    """The error in the form that crosses hosts."""
    return Failure(family=family_of(error), code=error.code, message=error.message, host=error.host, hint=error.hint)
