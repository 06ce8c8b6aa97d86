"""Many agents at once: connect in parallel, ask all the same, find who runs a container."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import trio

from migrate.bridge import Bridge
from migrate.inventory import Host
from migrate.link import AgentLink, ProgressSink, connect
from protocol import messages
from protocol.errors import MigrateError, UnsupportedError, UsageError

R = TypeVar("R", bound=messages.Message)


@dataclass(frozen=True, slots=True)
class Fleet:
    """The agents that answered, and why the others did not, by host name."""

    links: Mapping[str, AgentLink]
    errors: Mapping[str, MigrateError]

    def link(self, name: str) -> AgentLink:
        """The link to a host. Raises: why there is none."""
        if name in self.errors:
            raise self.errors[name]
        return self.links[name]


@asynccontextmanager
async def open_fleet(
    bridge: Bridge, hosts: Sequence[Host], on_progress: ProgressSink | None = None
) -> AsyncIterator[Fleet]:
    """Connect to all hosts at once; close all at the end of the block. Raises nothing for a host that fails."""
    links: dict[str, AgentLink] = {}
    errors: dict[str, MigrateError] = {}

    async def connect_one(host: Host) -> None:
        try:
            links[host.name] = await connect(bridge, host, on_progress)
        except MigrateError as error:
            errors[host.name] = error

    try:
        async with trio.open_nursery() as nursery:
            for host in hosts:
                nursery.start_soon(connect_one, host)
        yield Fleet(links, errors)
    finally:
        with trio.CancelScope(shield=True):  # bounded: every close is
            async with trio.open_nursery() as nursery:
                for link in links.values():
                    nursery.start_soon(link.close)


async def ask_all(
    fleet: Fleet, body: messages.RequestBody, answer: type[R]
) -> tuple[dict[str, R], dict[str, MigrateError]]:
    """The answers of all agents, and the errors of the rest (those that were not reached among them)."""
    answers: dict[str, R] = {}
    errors = dict(fleet.errors)

    async def ask_one(link: AgentLink) -> None:
        try:
            answers[link.name] = await link.request(body, answer)
        except MigrateError as error:
            errors[link.name] = error

    async with trio.open_nursery() as nursery:
        for link in fleet.links.values():
            nursery.start_soon(ask_one, link)
    return {name: answers[name] for name in fleet.links if name in answers}, errors


async def locate(fleet: Fleet, container: str) -> str:
    """Name of the host that runs `container`.

    Raises: UsageError: two of them; UnsupportedError: none of them (names those that could not be asked).
    """
    lists, errors = await ask_all(fleet, messages.ListContainers(), messages.ContainerList)
    found = {
        name: summary for name, answer in lists.items() for summary in answer.containers if summary.name == container
    }
    running = [name for name, summary in found.items() if summary.status in {"running", "paused"}]
    owners = sorted(running or found)
    if len(owners) > 1:
        raise UsageError(
            f"{' and '.join(owners)} both have a container {container}",
            code="ambiguous-container",
            hint=f"say which by --from {owners[0]}",
        )
    if not owners:
        asked = ", ".join(sorted(lists)) or "nobody"
        silent = "".join(f"; {error}" for error in errors.values())
        raise UnsupportedError(
            f"no host has a container {container} (asked: {asked}{silent})",
            code="no-such-container",
            hint="`migrate ps` lists what runs where",
        )
    return owners[0]
