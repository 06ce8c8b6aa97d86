"""Freeze, send the rest, commit: one request to the source, which decides alone. Then learn how it ended."""

from __future__ import annotations

import trio

from migrate.errors import LinkLostError, error_from_failure
from migrate.events import CutOverEnded
from migrate.phases import aftermath
from migrate.phases.session import Session
from protocol import messages as m
from protocol.errors import AbortedError, InDoubtError, MigrateError, NotConvergedError, RolledBackError

# Past the freeze budget the source thaws by itself, and it asks the target for 10 s after its commit.
ANSWER_S = 30.0


async def enter(session: Session) -> m.CutOverReport:
    """Cut over. Shielded: from here on the source decides how it ends; `Abort` is what asks it to stop.

    Raises: RolledBackError, NotConvergedError, AbortedError: the container runs on the source; InDoubtError.
    """
    budget_s = session.request.effective_freeze_budget_s
    ask = m.CutOver(migration=session.migration, freeze_budget_s=budget_s, stop_copy=not session.request.is_live)
    with trio.CancelScope(shield=True):
        try:
            with trio.fail_after(budget_s + ANSWER_S):
                report = (await session.source.request(ask, m.CutOverDone)).report
        except (LinkLostError, trio.TooSlowError) as lost:
            report = await aftermath.find_out(session, lost)
        if report.outcome == "in-doubt":
            report = await aftermath.settle(session, report)
    session.tell(CutOverEnded(report=report))
    match report.outcome:
        case "running":
            return report
        case "rolled-back":
            raise rolled_back(session, report)
        case _:
            raise in_doubt(session, report)


def rolled_back(session: Session, report: m.CutOverReport) -> MigrateError:
    """Why the source took the container back, by what an operator can do."""
    if report.error is None:
        return RolledBackError("the cut-over failed and was undone", host=session.source.name)
    error = error_from_failure(report.error, session.source.name)
    if isinstance(error, (AbortedError, NotConvergedError, RolledBackError)):
        return error
    return RolledBackError(error.message, code=error.code, host=error.host, hint=error.hint)


def in_doubt(session: Session, report: m.CutOverReport) -> InDoubtError:
    """The two sides do not agree by themselves."""
    message = report.error.message if report.error is not None else "it is not known where the container runs"
    return InDoubtError(
        message,
        code=report.error.code if report.error is not None else None,
        host=report.error.host if report.error is not None else session.source.name,
        hint=f"run: migrate recover {session.migration}",
    )
