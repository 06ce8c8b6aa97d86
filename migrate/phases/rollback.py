"""Undo a migration before its commit point, whatever the state it is in: both sides are told, bounded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from migrate.events import Unwinding, Warned
from migrate.link import AgentLink
from migrate.phases import aftermath
from migrate.phases.session import Session, ask_even_if_lost
from protocol import messages as m
from protocol.errors import InDoubtError, MigrateError, UsageError
from protocol.states import Side

REACH_S = 10.0  # An agent that went away undoes by itself; this is only to hear that it did.
ABORT_S = 30.0  # Thaw, network back, runtime objects removed: seconds; the agent goes on by itself past this.

Undo = Callable[[Session, str], Awaitable[None]]


class Unwinder:
    """The undo of each phase that was entered, run in reverse order."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._steps: list[Undo] = []

    def entering(self, undo: Undo) -> None:
        """Note the undo of a phase BEFORE it is entered: it may fail halfway."""
        self._steps.append(undo)

    async def unwind(self, reason: str) -> None:
        """Undo all, shielded. Raises: InDoubtError: a side says that it is too late."""
        with trio.CancelScope(shield=True):
            if self._steps:
                self._session.tell(Unwinding(reason=reason))
            while self._steps:
                await self._steps.pop()(self._session, reason)


async def abort_both(session: Session, reason: str) -> None:
    """Abort at the source, which decides, then at the target. A side that cannot be reached undoes by itself.

    Raises: InDoubtError: the source says that it is past its commit point.
    """
    await _abort(session, session.source, reason)
    await _abort(session, session.target, reason)


async def _abort(session: Session, link: AgentLink, reason: str) -> None:
    ask = m.Abort(migration=session.migration, reason=reason[:1000])
    try:
        await ask_even_if_lost(session, link, ask, m.Done, within_s=ABORT_S, reach_s=REACH_S)
    except MigrateError as error:
        if isinstance(error, UsageError) or error.code == "no-such-migration":
            return  # it was never begun there
        if link is session.source and error.code == "committed":
            raise InDoubtError(
                error.message, code=error.code, host=error.host, hint=f"run: migrate recover {session.migration}"
            ) from error
        if link is session.target and error.code == "committed":
            await _bear_witness(session)
            return
        session.tell(Warned(text=f"{link.name} could not be told to undo, it does so by itself: {error}"))


async def _bear_witness(session: Session) -> None:
    """The target stands frozen in RESTORED and waits for the source's word, whose link to it may be gone."""
    why = ""
    try:
        source = await aftermath.state_of(session, Side.SOURCE, within_s=REACH_S)
        if source in aftermath.SOURCE_HAS_IT:
            await aftermath.tell_side(session, Side.TARGET, source)
            return
        why = f"{session.source.name} is {source.value}"
    except MigrateError as error:
        why = str(error)
    session.tell(
        Warned(
            text=f"a frozen copy is left on {session.target.name} ({why}); remove it: "
            f"migrate recover {session.migration}"
        )
    )
