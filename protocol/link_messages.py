"""What two agents say to each other over the data link, beside sections and pages (AGENT frames).

As strict as the control messages. Who may say what when follows from protocol.states: COMMIT comes after RESTORED only.
"""

from __future__ import annotations

import msgspec

from protocol.messages import Count, Failure, Message, MigrationId, Text


class LinkHello(Message, frozen=True, kw_only=True):
    """First frame of the source's stream: which migration, so that a wrong one is refused."""

    migration: MigrationId
    epoch: Count
    stream: Count = 0


class LinkFreezing(Message, frozen=True, kw_only=True):
    """Source: the freeze comes next; whoever takes part in it should be ready."""

    migration: MigrationId


class LinkRestored(Message, frozen=True, kw_only=True):
    """Target: the container is whole here and frozen, and the journal says so."""

    migration: MigrationId
    parts: dict[str, float] = msgspec.field(default_factory=dict)
    pids: list[int] = msgspec.field(default_factory=list)


class LinkCommit(Message, frozen=True, kw_only=True):
    """Source: COMMITTED is on disk; run."""

    migration: MigrationId
    epoch: Count


class LinkRunning(Message, frozen=True, kw_only=True):
    """Target: RUNNING is on disk, the container runs."""

    migration: MigrationId
    parts: dict[str, float] = msgspec.field(default_factory=dict)


class LinkFailed(Message, frozen=True, kw_only=True):
    """Either side: this cannot go on. Before COMMITTED the source rolls back."""

    migration: MigrationId
    failure: Failure


class LinkAbort(Message, frozen=True, kw_only=True):
    """Source: ABORTED is on disk; discard."""

    migration: MigrationId
    reason: Text = ""


LinkMessage = LinkHello | LinkFreezing | LinkRestored | LinkCommit | LinkRunning | LinkFailed | LinkAbort
