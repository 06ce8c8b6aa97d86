"""The container runs at the target: wait until both sides have cleaned up."""

from __future__ import annotations

import trio

from migrate.events import Warned
from migrate.link import AgentLink
from migrate.phases.session import Session, ask_even_if_lost
from protocol import messages as m
from protocol.errors import MigrateError

CLEAN_UP_S = 60.0  # Killing a copy of many processes and deleting it takes a runtime some seconds.


async def enter(session: Session) -> None:
    """Ask both at once. What goes wrong here is a warning: the migration itself is done."""
    with trio.CancelScope(shield=True):
        async with trio.open_nursery() as nursery:
            for link in (session.source, session.target):
                nursery.start_soon(_finish, session, link)


async def _finish(session: Session, link: AgentLink) -> None:
    try:
        await ask_even_if_lost(session, link, m.Finish(migration=session.migration), m.Done, within_s=CLEAN_UP_S)
    except MigrateError as error:
        session.tell(Warned(text=f"{link.name} has not cleaned up yet: {error}"))
