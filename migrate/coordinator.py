"""A migration from end to end: the phases in order, and the way back through those that were entered."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import trio

from migrate.bridge import Bridge
from migrate.errors import InterruptedByUserError, RefusedError
from migrate.events import Event, Observer, PhaseEnded, PhaseStarted, Started, Transfer, Warned
from migrate.fleet import locate, open_fleet
from migrate.interrupts import Interrupts
from migrate.inventory import Inventory
from migrate.link import AgentLink, ProgressSink
from migrate.phases import cutover, finish, precopy, prepare, rollback, survey
from migrate.phases.session import Session
from migrate.phases.survey import Survey
from migrate.report.result import Result
from migrate.report.tally import Tally
from migrate.request import MigrationRequest
from protocol import messages as m
from protocol.errors import (
    AbortedError,
    BusyError,
    InDoubtError,
    MigrateError,
    NotConvergedError,
    RolledBackError,
    UnsupportedError,
)

# These say by themselves where the container is; every other error after the first touch becomes a RolledBackError.
_SAYS_WHERE = (AbortedError, InDoubtError, NotConvergedError, RolledBackError)
FIRST_EPOCH = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a migration ended."""

    result: Result
    error: MigrateError | None

    @property
    def exit_status(self) -> int:
        """Of the process, as DESIGN's table has it."""
        return self.error.exit_status if self.error is not None else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOutcome:
    """A preflight, and between whom."""

    source: str
    target: str
    survey: Survey


async def migrate(bridge: Bridge, inventory: Inventory, request: MigrationRequest, observers: list[Observer]) -> Ending:
    """Move a container. Never raises MigrateError: the ending has it. Ctrl-C aborts in order."""
    tally = Tally(request)
    everyone: list[Observer] = [tally, *observers]

    def tell(event: Event) -> None:
        for observer in everyone:
            observer(event)

    interrupts = Interrupts(tell)
    error: MigrateError | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(interrupts.watch)
        try:
            with interrupts.scope:
                await _Run(bridge, inventory, request, tell, tally, interrupts).run()
        except MigrateError as failure:
            error = failure
        nursery.cancel_scope.cancel()
    if interrupts.requested and (interrupts.scope.cancelled_caught or isinstance(error, AbortedError)):
        error = InterruptedByUserError("interrupted; the container runs on the source", code="interrupted")
    return Ending(result=tally.result(error), error=error)


async def check(bridge: Bridge, inventory: Inventory, request: MigrationRequest) -> CheckOutcome:
    """Preflight alone. Raises: MigrateError: the hosts could not be asked."""
    async with _between(bridge, inventory, request) as (source, target, _):
        return CheckOutcome(source=source.name, target=target.name, survey=await survey.enter(source, target, request))


class _Run:
    """One attempt; `run` reads as the table of contents of a migration."""

    def __init__(
        self,
        bridge: Bridge,
        inventory: Inventory,
        request: MigrationRequest,
        tell: Observer,
        tally: Tally,
        interrupts: Interrupts,
    ) -> None:
        self._bridge = bridge
        self._inventory = inventory
        self._request = request
        self._tell = tell
        self._tally = tally
        self._interrupts = interrupts
        self._deadline = trio.current_time() + request.timeout_s

    async def run(self) -> None:
        """Connect, look, move."""
        async with _between(self._bridge, self._inventory, self._request, self._on_progress) as between:
            source, target, warnings = between
            self._tally.located(source.name)
            with _phase("check", self._tell):
                seen = await survey.enter(source, target, self._request)
            self._tally.surveyed(seen)
            for warning in (*warnings, *seen.preflight.warnings):
                self._tell(Warned(text=warning))
            if seen.preflight.refusals:
                raise RefusedError(seen.preflight.refusals)
            session = Session(
                migration=f"m{secrets.token_hex(5)}",
                epoch=FIRST_EPOCH,
                request=self._request,
                bridge=self._bridge,
                source=source,
                target=target,
                tell=self._tell,
            )
            self._tell(
                Started(
                    migration=session.migration,
                    container=self._request.container,
                    source=source.name,
                    target=target.name,
                    memory_bytes=seen.container.memory_bytes,
                )
            )
            await self._until_committed(session, seen)
            with _phase("finish", self._tell):
                await finish.enter(session)

    async def _until_committed(self, session: Session, seen: Survey) -> None:
        """All that can be undone. Raises: MigrateError that says where the container is."""
        unwinder = rollback.Unwinder(session)
        frozen = False
        try:
            with _before(self._deadline, self._request.timeout_s):
                unwinder.entering(prepare.undo)
                with _phase("prepare", self._tell):
                    prepared = await prepare.enter(session, seen)
                self._tally.set_up()
                if self._request.is_live:
                    with _phase("precopy", self._tell):
                        await precopy.enter(session, prepared, self._deadline)
            await trio.lowlevel.checkpoint_if_cancelled()  # an interrupt counts up to here
            self._interrupts.cutting_over(session)
            frozen = True
            with _phase("cutover", self._tell):
                await cutover.enter(session)
        except InDoubtError:
            self._interrupts.unwinding()
            raise  # past the commit point, or nobody knows: nothing may be undone
        except MigrateError as error:
            self._interrupts.unwinding()
            await unwinder.unwind(str(error))
            if isinstance(error, _SAYS_WHERE) or (not frozen and isinstance(error, (UnsupportedError, BusyError))):
                raise
            raise RolledBackError(error.message, code=error.code, host=error.host, hint=error.hint) from error
        except BaseException:  # cancelled by an interrupt, or a bug of ours: the container comes first
            self._interrupts.unwinding()
            await unwinder.unwind("interrupted" if self._interrupts.requested else "the coordinator failed")
            raise
        self._interrupts.committed()

    def _on_progress(self, progress: m.Progress) -> None:
        self._tell(
            Transfer(
                phase=progress.phase,
                round=progress.round + 1 if progress.phase == "precopy" else 0,
                done_bytes=progress.done_bytes,
                total_bytes=progress.total_bytes,
                wire_bytes=progress.wire_bytes,
                detail=progress.detail,
            )
        )


@contextmanager
def _phase(name: str, tell: Observer) -> Iterator[None]:
    """Tells the start and, if it went well, the end of a phase."""
    began = trio.current_time()
    tell(PhaseStarted(phase=name))
    yield
    tell(PhaseEnded(phase=name, ms=(trio.current_time() - began) * 1000.0))


@contextmanager
def _before(deadline: float, timeout_s: float) -> Iterator[None]:
    """Raises: NotConvergedError: the block was not done by `deadline` (on trio's clock)."""
    with trio.CancelScope(deadline=deadline) as scope:
        yield
    if scope.cancelled_caught:
        raise NotConvergedError(
            f"not ready to cut over within {timeout_s:g} s",
            code="timeout",
            hint="a longer --timeout, more --bandwidth, or a quieter time",
        )


@asynccontextmanager
async def _between(
    bridge: Bridge, inventory: Inventory, request: MigrationRequest, on_progress: ProgressSink | None = None
) -> AsyncIterator[tuple[AgentLink, AgentLink, list[str]]]:
    """Links to source and target, and warnings. Without a source all hosts are asked who runs the container.

    Raises: UsageError: unknown host, or two run it; UnsupportedError: none does; PeerError: not reached.
    """
    target = inventory.host(request.target)
    hosts = [inventory.host(request.source), target] if request.source else list(inventory.hosts.values())
    distinct = {host.name: host for host in hosts}
    async with open_fleet(bridge, list(distinct.values()), on_progress) as fleet:
        source = request.source or await locate(fleet, request.container)
        silent = sorted(fleet.errors.keys() - {source, target.name})
        warnings = [f"{name} could not be asked whether it runs {request.container}, too" for name in silent]
        yield fleet.link(source), fleet.link(target.name), warnings
