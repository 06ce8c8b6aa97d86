"""What every phase of one migration shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import trio

from migrate.bridge import Bridge
from migrate.errors import LinkLostError
from migrate.events import Observer
from migrate.link import AgentLink, open_link
from migrate.request import MigrationRequest
from protocol import messages
from protocol.errors import PeerError

R = TypeVar("R", bound=messages.Message)

RETRY_S = 0.5  # between attempts to reach a host again: a restarted agent needs about a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One migration, its two agents, and who is told about it."""

    migration: str
    epoch: int
    request: MigrationRequest
    bridge: Bridge
    source: AgentLink
    target: AgentLink
    tell: Observer


async def ask_even_if_lost(
    session: Session,
    link: AgentLink,
    body: messages.RequestBody,
    answer: type[R],
    *,
    within_s: float,
    reach_s: float | None = None,
) -> R:
    """Ask over `link`; if it is lost, over new ones, for `reach_s` (None: until `within_s`). For idempotent requests.

    Raises: PeerError: no answer in time; what the agent answers.
    """
    last: PeerError | None = None
    with trio.move_on_after(within_s):
        try:
            return await link.request(body, answer)
        except LinkLostError as lost:
            last = lost
        with trio.move_on_after(reach_s if reach_s is not None else within_s):
            while True:
                try:
                    async with open_link(session.bridge, link.host) as again:
                        return await again.request(body, answer)
                except PeerError as error:
                    last = error
                await trio.sleep(RETRY_S)
    raise last or PeerError(f"no answer within {within_s:.0f} s", code="no-answer", host=link.name)
