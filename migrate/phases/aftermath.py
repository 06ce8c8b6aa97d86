"""The link to the source was lost in the cut-over: learn from the journals how it ended."""

from __future__ import annotations

import msgspec
import trio

from migrate.errors import failure_of
from migrate.events import Warned
from migrate.phases.session import RETRY_S, Session, ask_even_if_lost
from protocol import messages as m
from protocol.errors import InDoubtError, MigrateError, PeerError, RolledBackError
from protocol.states import Side, State

REACH_S = 20.0  # A restarted agent settles its journal within seconds.

SOURCE_HAS_IT = frozenset({State.ABORTED, State.RECLAIMED})
_TARGET_RUNS_IT = frozenset({State.RUNNING, State.FINISHED, State.FORCED})


async def find_out(session: Session, lost: Exception) -> m.CutOverReport:
    """Ask the source, then the target, for at most 2 x REACH_S. Never raises MigrateError: doubt is an outcome."""
    source: State | None = None
    with trio.move_on_after(REACH_S):
        while True:
            try:
                source = await state_of(session, Side.SOURCE, within_s=REACH_S)
            except MigrateError:
                break  # the target may know
            if source in SOURCE_HAS_IT:
                error = RolledBackError(f"the link to the source was lost in the cut-over ({lost}), which undid it")
                return m.CutOverReport(outcome="rolled-back", error=failure_of(error))
            if source in _TARGET_RUNS_IT:
                return _running(session)
            if source is State.COMMITTED:
                break  # the target may run it; `settle` tells each of the other
            await trio.sleep(RETRY_S)  # the source decides alone, within its freeze budget
    try:
        target = await state_of(session, Side.TARGET, within_s=REACH_S)
    except MigrateError:
        target = None
    if target in _TARGET_RUNS_IT and source is not State.COMMITTED:
        return _running(session)
    if target is State.DISCARDED and source is not State.COMMITTED:
        error = RolledBackError(f"the link to the source was lost in the cut-over ({lost}); the target has discarded")
        return m.CutOverReport(outcome="rolled-back", error=failure_of(error))
    doubt = InDoubtError(
        f"the link to the source was lost in the cut-over ({lost}); its journal says {_word(source)}, that of "
        f"{session.target.name} {_word(target)}"
    )
    return m.CutOverReport(outcome="in-doubt", error=failure_of(doubt))


async def settle(session: Session, doubt: m.CutOverReport) -> m.CutOverReport:
    """The source has committed and not heard from the target: bear witness of its COMMITTED, and of the answer.

    Gives `doubt` back when that cannot be done within REACH_S. Never raises MigrateError.
    """
    with trio.move_on_after(REACH_S):
        while True:
            try:
                source = await state_of(session, Side.SOURCE, within_s=REACH_S)
                target = await state_of(session, Side.TARGET, within_s=REACH_S)
                if source is State.COMMITTED and target is State.RESTORED:
                    target = await tell_side(session, Side.TARGET, source)
                if source is State.COMMITTED and target in {*_TARGET_RUNS_IT, State.DISCARDED}:
                    source = await tell_side(session, Side.SOURCE, target)
            except MigrateError as error:
                session.tell(Warned(text=f"not settled yet: {error}"))
            else:
                if source in SOURCE_HAS_IT:
                    back = RolledBackError("the target was lost after the commit and had discarded its copy")
                    return m.CutOverReport(outcome="rolled-back", error=failure_of(back))
                if source in _TARGET_RUNS_IT:
                    return msgspec.structs.replace(doubt, outcome="running", error=None)
            await trio.sleep(RETRY_S)
    return doubt


async def tell_side(session: Session, side: Side, peer: State) -> State:
    """Tell one side what the other's journal says. Gives its state afterwards."""
    link = session.source if side is Side.SOURCE else session.target
    ask = m.Settle(migration=session.migration, epoch=session.epoch, peer_state=peer.value)
    await ask_even_if_lost(session, link, ask, m.Done, within_s=REACH_S)
    return await state_of(session, side, within_s=REACH_S)


async def state_of(session: Session, side: Side, *, within_s: float) -> State:
    """What the journal of that side says. Raises: PeerError: not reached, or it knows nothing of this migration."""
    link = session.source if side is Side.SOURCE else session.target
    ask = m.GetStatus(migration=session.migration)
    reply = await ask_even_if_lost(session, link, ask, m.StatusReply, within_s=within_s)
    for status in reply.migrations:
        if status.migration == session.migration and status.side == side.value:
            return State(status.state)
    raise PeerError(f"does not know migration {session.migration}", code="no-such-migration", host=link.name)


def _running(session: Session) -> m.CutOverReport:
    session.tell(Warned(text="the link to the source was lost in the cut-over: the downtime is not known"))
    return m.CutOverReport(outcome="running")


def _word(state: State | None) -> str:
    return state.value if state is not None else "nothing (not reached)"
