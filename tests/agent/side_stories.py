"""How far a side gets before a story begins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from agent import source, target
from protocol import link_messages as link
from protocol import messages as m
from protocol.errors import (
    MigrateError,
)
from tests.agent.side_rig import ID, Network, SideRig

CONNECT = m.ConnectSource(migration=ID, address="10.0.0.2", port=7100, host_key="ssh-ed25519 AAAA")
CUT_OVER = m.CutOver(migration=ID, freeze_budget_s=2.0)

Story = Callable[[SideRig], Coroutine[Any, Any, None]]


async def until(fact: Callable[[], object]) -> None:
    while not fact():  # noqa: ASYNC110  (facts of the log have no event)
        await asyncio.sleep(0)


async def precopy(rig: SideRig) -> source.SourceMigration:
    migration = rig.source()
    await migration.begin()
    await migration.connect(CONNECT)
    return migration


async def committed(rig: SideRig) -> source.SourceMigration:
    """The source has committed and heard nothing from the target."""
    migration = await precopy(rig)
    rig.dumped()
    rig.link_restored()
    cutting = asyncio.create_task(migration.cut_over(CUT_OVER))
    await until(lambda: rig.sent(link.LinkCommit))
    rig.live.link.fail(MigrateError("the link broke", code="link-lost"), lasting=True)
    assert (await cutting).outcome == "in-doubt"
    return migration


async def waiting(rig: SideRig, *networks: Network) -> target.TargetMigration:
    """The target is in RESTORED."""
    migration = rig.target()
    await migration.prepare("")
    migration._networks = list(networks)  # type: ignore[arg-type]
    rig.restored()
    await until(lambda: rig.sent(link.LinkRestored))
    return migration
