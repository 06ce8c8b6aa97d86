"""Migrations as the journals of all hosts know them: find, abort, settle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from migrate.fleet import Fleet, ask_all
from migrate.link import AgentLink
from protocol import messages as m
from protocol.errors import InDoubtError, MigrateError, PeerError, UsageError
from protocol.states import FINAL, Side, State

# The source decides in these by itself, within its freeze budget.
_SOURCE_DECIDES = frozenset({State.CUT_OVER, State.RESTORED})
_GOING_ON = frozenset({State.PREPARING, State.PRECOPY})


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One side of a migration, on a host."""

    host: str
    status: m.MigrationStatus

    @property
    def state(self) -> State:
        """Where that side stands."""
        return State(self.status.state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """How `recover` left a migration."""

    migration: str
    container: str
    source_state: str  # '' : not known
    target_state: str
    owner: str  # host that runs the container


async def find(
    fleet: Fleet, migration: str = "", *, unfinished_only: bool = False
) -> tuple[list[Known], list[MigrateError]]:
    """All sides of one migration, or of all, newest first; and why some hosts did not answer."""
    ask = m.GetStatus(migration=migration, unfinished_only=unfinished_only)
    replies, errors = await ask_all(fleet, ask, m.StatusReply)
    known = [Known(host=host, status=status) for host, reply in replies.items() for status in reply.migrations]
    return sorted(known, key=lambda item: (-item.status.started, item.status.side)), list(errors.values())


async def abort(fleet: Fleet, migration: str, reason: str) -> list[str]:
    """End a migration before its commit point: source first, then target. Gives the hosts that were told.

    Raises: UsageError: no host knows it, or it is over; MigrateError: it is past its commit point.
    """
    known, errors = await find(fleet, migration)
    if not known:
        raise _unknown(migration, errors)
    told = []
    for item in sorted(known, key=lambda item: item.status.side != Side.SOURCE.value):
        if item.state in FINAL:
            continue
        await fleet.link(item.host).request(m.Abort(migration=migration, reason=reason), m.Done)
        told.append(item.host)
    if not told:
        states = ", ".join(f"{item.host} {item.state.value}" for item in known)
        raise UsageError(f"migration {migration} is over: {states}", code="migration-over")
    return told


async def recover(fleet: Fleet, migration: str, *, source_is_dead: bool) -> Settled:
    """Tell each side what the other's journal says, until both are at their end.

    Raises: InDoubtError: they cannot be settled; UsageError: no host knows it.
    """
    known, errors = await find(fleet, migration)
    source = _side(known, Side.SOURCE)
    target = _side(known, Side.TARGET)
    if source is None and target is None:
        raise _unknown(migration, errors)
    if source_is_dead:
        return await _force(fleet, migration, source, target)
    _refuse_if_under_way(migration, source, target)
    epoch = max(item.status.epoch for item in (source, target) if item is not None)
    said: list[MigrateError] = []
    # The target's word first: it may end the source's doubt. If not, the source's may end the target's.
    for asked, other in ((source, Side.TARGET), (target, Side.SOURCE), (source, Side.TARGET)):
        if asked is None:
            continue
        fresh, _ = await find(fleet, migration)
        mine, theirs = _side(fresh, Side(asked.status.side)), _side(fresh, other)
        if mine is None or mine.state in FINAL:
            continue
        word = theirs.state.value if theirs is not None else "unknown"
        try:
            await _settle(fleet.link(mine.host), migration, epoch, word)
        except MigrateError as error:
            said.append(error)
    return _outcome(migration, (await find(fleet, migration))[0], [*said, *errors])


async def _force(fleet: Fleet, migration: str, source: Known | None, target: Known | None) -> Settled:
    if source is not None and not _has_lost_its_copy(source):
        raise UsageError(
            f"the source {source.host} answers: it is not dead",
            code="source-lives",
            hint=f"migrate recover {migration}",
        )
    if target is None:
        raise InDoubtError(
            f"no target of migration {migration} answers: nothing can run there", code="target-silent",
            hint=f"bring it back, then: migrate recover {migration} --source-is-dead",
        )  # fmt: skip
    epoch = target.status.epoch + 1
    await _settle(fleet.link(target.host), migration, epoch, "unknown", source_is_dead=True)
    if source is not None:
        # What its runtime and journal still have of the container must go, else both hosts list it.
        fresh = _side((await find(fleet, migration))[0], Side.TARGET)
        await _settle(fleet.link(source.host), migration, epoch, (fresh or target).state.value)
    return _outcome(migration, (await find(fleet, migration))[0], [])


def _has_lost_its_copy(source: Known) -> bool:
    """Its host was down in the cut-over: it has not committed, and has nothing left that could run."""
    return source.state in _SOURCE_DECIDES and not source.status.copy_alive


async def _settle(
    link: AgentLink, migration: str, epoch: int, peer_state: str, *, source_is_dead: bool = False
) -> None:
    ask = m.Settle(migration=migration, epoch=epoch, peer_state=peer_state, source_is_dead=source_is_dead)
    await link.request(ask, m.Done)


def _refuse_if_under_way(migration: str, source: Known | None, target: Known | None) -> None:
    if source is None:
        return
    if _has_lost_its_copy(source):
        if target is not None and target.state is State.RESTORED:
            raise InDoubtError(
                f"{source.host} was down in the cut-over and has lost its copy of {source.status.container}; the one "
                f"that stands frozen on {target.host} is the last",
                code="source-copy-gone", host=target.host,
                hint=f"let it run there: migrate recover {migration} --source-is-dead",
            )  # fmt: skip
        return
    if source.state in _GOING_ON or source.state in _SOURCE_DECIDES:
        where = f", {target.host} {target.state.value}" if target is not None else ""
        raise InDoubtError(
            f"migration {migration} is before its commit point ({source.host} {source.state.value}{where}): "
            "the container is the source's",
            code="under-way",
            host=source.host,
            hint=f"wait, or end it: migrate abort {migration}",
        )


def _outcome(migration: str, known: list[Known], said: Iterable[MigrateError]) -> Settled:
    source, target = _side(known, Side.SOURCE), _side(known, Side.TARGET)
    open_sides = [item for item in (source, target) if item is not None and item.state not in FINAL]
    if open_sides:
        states = ", ".join(f"{item.host} {item.state.value}" for item in open_sides)
        why = "".join(f"; {error}" for error in said)
        raise InDoubtError(
            f"migration {migration} is not settled: {states}{why}",
            hint="bring the other host back and try again; if the source is dead for good and switched off: "
            f"migrate recover {migration} --source-is-dead",
        )
    some = source or target
    assert some is not None
    runs_on_target = target is not None and target.state is State.FINISHED
    if not runs_on_target and source is not None and source.state is State.FINISHED:
        runs_on_target = True
    owner = (target.host if target else some.status.peer) if runs_on_target else (source or some).host
    if not runs_on_target and source is None:
        owner = some.status.peer
    return Settled(
        migration=migration,
        container=some.status.container,
        source_state=source.status.state if source else "",
        target_state=target.status.state if target else "",
        owner=owner,
    )


def _side(known: list[Known], side: Side) -> Known | None:
    return next((item for item in known if item.status.side == side.value), None)


def _unknown(migration: str, errors: list[MigrateError]) -> MigrateError:
    silent = "".join(f"; {error}" for error in errors)
    kind = PeerError if errors else UsageError
    return kind(f"no host that answers knows migration {migration}{silent}", code="no-such-migration")
