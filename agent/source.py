"""The source's side of one migration: the agent decides here, engine and stream do the work.

The order of journal, freezer and messages in `cut_over` is the commit protocol; see protocol/states.py and
docs/explanation/decisions/0005.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

from agent import background, containers, reclaim, undo
from agent.engine import base
from agent.host import Host
from agent.ipc import PortClosedError
from agent.journal import Undo
from agent.kernel.freezer import Freezer
from agent.kernel.urgent import Urgency
from agent.network import capture
from agent.worker import Workers
from protocol import link_messages as link
from protocol import messages as m
from protocol.errors import AbortedError, InDoubtError, MigrateError, NotConvergedError, UnsupportedError, family_of
from protocol.states import Event, Side, State, may_abort, owner

_log = logging.getLogger(__name__)

# The engine thaws within milliseconds; one that does not answer in this time is killed, which thaws as well.
_THAW_TIMEOUT_S = 2.0
# Of the round that was under way, of the stream that is gone, and its own.
_THAW_ATTEMPTS = 3
# What the engine does before it stops the first task (catchers, garbage collection) is in no freeze budget.
_READY_TO_FREEZE_S = 5.0
# Tasks that stand in a ptrace stop freeze within a millisecond.
_FREEZE_TIMEOUT_S = 1.0
# What the target does after COMMIT takes milliseconds; past this the outcome is asked for, not guessed.
_RUNNING_TIMEOUT_S = 10.0
# Packets for the container may reach the old place until the network has learned the new one.
_FORWARD_AFTER_RUNNING_S = 1.0
_SIDE = Side.SOURCE


def failure_of(error: MigrateError, host: str) -> m.Failure:
    """An error as a message."""
    return m.Failure(
        family=family_of(error), code=error.code, message=error.message, host=error.host or host, hint=error.hint
    )


class SourceMigration:
    """One container on its way out of this host."""

    side = _SIDE

    def __init__(self, host: Host, request: m.BeginSource, coordinator: str) -> None:
        self.id = request.migration
        self.epoch = request.epoch
        self.container = request.container
        self._host = host
        self._request = request
        self._coordinator = coordinator
        self._workers: Workers | None = None
        self._report: m.ContainerReport
        self._freezer: Freezer
        self._ending: asyncio.Task[None] | None = None
        self._is_beginning = True
        self._begun = asyncio.Event()
        self._in_cut_over = False
        self._cut_over_ended = asyncio.Event()
        # What ended it; whatever fails after that is a consequence.
        self._why: MigrateError | None = None

    @property
    def state(self) -> State:
        """From the journal, the only place that has it."""
        entry = self._host.journal.find(self.id, _SIDE)
        if entry is None:
            raise UnsupportedError(f"migration {self.id} is not in the journal", code="no-such-migration")
        return entry.state

    @property
    def _live(self) -> Workers:
        if self._workers is None or self._why is not None:
            raise self._why or AbortedError(f"migration {self.id} has ended ({self.state.value})")
        return self._workers

    @contextlib.contextmanager
    def _saying_why(self) -> Iterator[None]:
        """A request that fails because the migration is being rolled back fails with the reason for that."""
        try:
            yield
        except MigrateError as error:
            if self._why is None or self._why is error:
                raise
            raise self._why from error

    # ------------------------------------------------------------ prepare

    async def begin(self) -> m.SourceBegun:
        """Lock, inspect, start the processes. On failure nothing stays behind."""
        try:
            return await self._begin()
        finally:
            self._is_beginning = False
            self._begun.set()

    async def _begin(self) -> m.SourceBegun:
        found = await asyncio.to_thread(containers.find, self._host.runtimes, self.container)
        self._host.journal.begin(
            migration=self.id, side=_SIDE, epoch=self.epoch, container=self.container,
            peer=self._request.target, coordinator=self._coordinator,
        )  # fmt: skip
        try:
            self._report = await asyncio.to_thread(
                lambda: containers.report(
                    found, storage=self._request.storage, tcp=self._request.tcp, network=self._request.network,
                    bridge=self._host.settings.network.bridge,
                )
            )  # fmt: skip
            if self._report.refusals:
                first = self._report.refusals[0]
                raise UnsupportedError(first.message, code=first.code, hint=first.hint)
            self._freezer = Freezer.of(self._report.pid)
            self._workers = await Workers.start(_SIDE, self._lost)
            key = await self._live.stream.ask(base.StreamMakeKey(), base.StreamKey)
            _ = self._live  # nobody has ended it meanwhile
        except BaseException as error:
            self._is_beginning = False
            await self.abort(f"the source could not be prepared: {error}")
            raise
        return m.SourceBegun(client_public_key=key.public_key, report=self._report)

    async def connect(self, request: m.ConnectSource) -> m.SourceConnected:
        """Data link up, tracker armed."""
        with self._saying_why():
            return await self._connect(request)

    async def _connect(self, request: m.ConnectSource) -> m.SourceConnected:
        live = self._live
        await live.stream.ask(
            base.StreamConnect(
                address=request.address, port=request.port, host_key=request.host_key, migration=self.id,
                epoch=self.epoch, compress=request.compress, bandwidth=request.bandwidth,
            ),
            base.StreamUp,
        )  # fmt: skip
        armed = await live.engine.ask(
            base.SourceArm(
                pid=self._report.pid, track=request.track, tcp=self._request.tcp, storage=self._request.storage
            ),
            base.SourceArmed,
        )
        self._host.journal.move(self.id, _SIDE, Event.ARMED)
        return m.SourceConnected(armed_ms=armed.stop_ms)

    async def run_round(self, number: int) -> m.RoundReport:
        """One pre-copy round."""
        with self._saying_why():
            done = await self._live.engine.ask(base.SourceRound(round=number), base.SourceRoundDone)
        return done.report

    async def counters(self) -> base.StreamCounters:
        """What the stream has moved so far."""
        with self._saying_why():
            return await self._live.stream.ask(base.StreamGetCounters(), base.StreamCounters)

    # ------------------------------------------------------------ cut-over

    @property
    def _interfaces(self) -> list[m.Interface]:
        """What is cut off its bridge in the freeze."""
        if self._request.network != "keep":
            return []
        return [interface for interface in self._report.network.interfaces if interface.bridge]

    def _undo_of_cut_over(self) -> list[Undo]:
        """Newest is undone first: network back, sockets out of repair mode, and only then the thaw."""
        return [
            undo.thaw(self._freezer.paths),
            undo.repair_off([self._report.pid]),
            *(undo.uncut(interface) for interface in self._interfaces),
        ]

    async def cut_over(self, request: m.CutOver) -> m.CutOverReport:
        """Freeze, dump, commit. Before COMMITTED every failure ends with the container running here."""
        live = self._live
        facts = reclaim.facts_of_source(self._host, self._report, self._freezer, self._interfaces)
        self._host.journal.move(self.id, _SIDE, Event.FREEZE, facts=facts, undo=self._undo_of_cut_over())
        self._in_cut_over = True
        urgency = Urgency()
        try:
            live.send_link(link.LinkFreezing(migration=self.id))
            urgency.begin()
            return await self._cut_over(live, request)
        finally:
            urgency.end()
            self._in_cut_over = False
            self._cut_over_ended.set()

    async def _cut_over(self, live: Workers, request: m.CutOver) -> m.CutOverReport:
        try:
            frozen, dumped, restored, parts = await self._freeze_until_restored(live, request)
            # --- the decision: from this fsync on the target owns the container. If it fails, the record is not there,
            # or the roll-back finds it and refuses.
            clock = time.monotonic_ns()
            self._host.journal.move(self.id, _SIDE, Event.RESTORED, Event.COMMIT, clear_undo=True)
        except Exception as error:  # noqa: BLE001  (whatever it was, nobody else would thaw the container)
            self._in_cut_over = False
            reason = self._reason(error, request)
            await self.abort(str(reason))
            return m.CutOverReport(outcome="rolled-back", error=failure_of(reason, self._host.name))
        self._in_cut_over = False
        self._cut_over_ended.set()
        parts["journal"] = (time.monotonic_ns() - clock) / 1e6
        return await self._commit(live, frozen, dumped, restored, parts)

    async def _freeze_until_restored(
        self, live: Workers, request: m.CutOver
    ) -> tuple[base.SourceFrozen, base.SourceDumped, link.LinkRestored, dict[str, float]]:
        async with asyncio.timeout(request.freeze_budget_s + _READY_TO_FREEZE_S):
            frozen = await live.engine.ask(
                base.SourceCutOver(freeze_budget_s=request.freeze_budget_s, cut=self._interfaces), base.SourceFrozen
            )
        spent_s = (time.monotonic_ns() - frozen.monotonic_ns) / 1e9
        async with asyncio.timeout(max(0.0, request.freeze_budget_s - spent_s)):
            dumped = await live.engine.inbox.get(base.SourceDumped)
            heard = time.monotonic_ns()
            # The ptrace stop dies with the engine, this one does not; it decides ownership.
            self._freezer.freeze()
            self._freezer.wait_frozen(_FREEZE_TIMEOUT_S)
            stop = await live.engine.ask(base.SourceVerifyStop(), base.SourceStopVerified)
            if not stop.unbroken:
                raise MigrateError(f"the container ran again while it was dumped: {stop.detail}", code="stop-broken")
            restored = await live.link.get(link.LinkRestored)
            if live.link.error is not None:  # lost since then: better undone than in doubt
                raise live.link.error
        parts = dict(dumped.parts)
        parts["hand-over"] = (heard - frozen.monotonic_ns) / 1e6 - sum(dumped.parts.values())
        parts["copy and restore"] = (time.monotonic_ns() - heard) / 1e6
        return frozen, dumped, restored, parts

    def _reason(self, error: BaseException, request: m.CutOver) -> MigrateError:
        if self._why is not None:
            return self._why
        if isinstance(error, TimeoutError):
            return NotConvergedError(
                f"the freeze took longer than its budget of {request.freeze_budget_s:g} s; "
                f"{self.container} runs on here",
                code="freeze-budget", hint="a larger --freeze-budget, or a time with less load",
            )  # fmt: skip
        if isinstance(error, MigrateError):
            return error
        _log.error("%s: the cut-over failed", self.id, exc_info=error)
        return MigrateError(f"the cut-over failed: {type(error).__name__}: {error}")

    async def _commit(
        self, live: Workers, frozen: base.SourceFrozen, dumped: base.SourceDumped, restored: link.LinkRestored,
        parts: dict[str, float],
    ) -> m.CutOverReport:  # fmt: skip
        sent_at = time.monotonic_ns()
        error: m.Failure | None = None
        running: link.LinkRunning | None = None
        try:
            live.send_link(link.LinkCommit(migration=self.id, epoch=self.epoch))
            async with asyncio.timeout(_RUNNING_TIMEOUT_S):
                running = await live.link.get(link.LinkRunning)
        except (MigrateError, TimeoutError) as lost:
            doubt = InDoubtError(
                f"committed, but the target has not said that {self.container} runs there: {lost or 'no answer'}",
                hint=f"migrate recover {self.id}",
            )
            error = failure_of(doubt, self._host.name)
        ended = time.monotonic_ns()
        parts["commit"] = (ended - sent_at) / 1e6
        if running is not None and self._ending is None:  # else somebody has told this side before, see `settle`
            self._host.journal.move(self.id, _SIDE, Event.RUNNING)
            self._ending = background.start(self._clean_up(), f"{self.id}: clean-up of the source")
        counted = await self._counters_or_none(live)
        return m.CutOverReport(
            outcome="in-doubt" if running is None else "running", downtime_ms=(ended - frozen.monotonic_ns) / 1e6,
            parts=parts, target_parts=restored.parts | (running.parts if running else {}),
            dirty_bytes=dumped.dirty_bytes, sent_bytes=counted.page_bytes, wire_bytes=counted.wire_bytes,
            packets_caught=counted.packets, packets_dropped=counted.packets_dropped, pids=dumped.pids,
            connections=dumped.connections, error=error,
        )  # fmt: skip

    async def _counters_or_none(self, live: Workers) -> base.StreamCounters:
        try:
            return await live.stream.ask(base.StreamGetCounters(), base.StreamCounters)
        except MigrateError:
            return base.StreamCounters()

    async def _clean_up(self) -> None:
        """After RUNNING: kill the frozen copy, forget it, keep forwarding packets for a while."""
        live = self._workers
        running_since = time.monotonic()
        entry = self._host.journal.find(self.id, _SIDE)
        facts: dict[str, Any] = entry.facts if entry else {}
        try:
            await asyncio.to_thread(reclaim.kill_source_copy, facts)
            if live is not None:
                with contextlib.suppress(MigrateError):  # the engine may be dead: then nobody holds the dead tasks
                    await live.engine.ask(base.SourceRelease(), base.EngineDone)
            await asyncio.to_thread(reclaim.delete_source_container, facts)
            await asyncio.sleep(max(0.0, running_since + _FORWARD_AFTER_RUNNING_S - time.monotonic()))
        finally:
            self._workers = None
            if live is not None:
                await live.close()
        await asyncio.to_thread(reclaim.forget_source_network, facts)
        self._host.journal.move(self.id, _SIDE, Event.CLEANED)

    # ------------------------------------------------------------ ending

    def _lost(self, error: MigrateError) -> None:
        """A process or the link failed outside of a request: before the cut-over that ends the migration."""
        if self._is_beginning:
            self._why = self._why or error  # `begin` meets it at its next step, and undoes what it did
            return
        if self._in_cut_over or self._ending is not None or not may_abort(_SIDE, self.state):
            return
        _log.warning("%s: %s; the container runs on here", self.id, error)
        self._why = error
        self._start_roll_back(str(error))

    async def abort(self, reason: str) -> None:
        """End it before its commit point. Raises: MigrateError: it is past that."""
        if self._is_beginning:
            # What is being made cannot be undone before it is there; `begin` undoes it.
            self._why = self._why or AbortedError(reason)
            await self._begun.wait()
        if self._in_cut_over:
            self._why = self._why or AbortedError(reason)
            if self._workers is not None:
                # Whichever of the two is waited for; the link's error stays, for the wait that may come next.
                self._workers.engine.inbox.fail(self._why, lasting=False)
                self._workers.link.fail(self._why, lasting=True)
            await self._cut_over_ended.wait()
        state = self.state
        if owner(state) is Side.TARGET:
            raise MigrateError(
                f"{self.id} is past its commit point ({state.value}): the target owns {self.container}",
                code="committed", host=self._host.name, hint=f"migrate status {self.id}",
            )  # fmt: skip
        if self._ending is None:
            if state in {State.ABORTED, State.RECLAIMED}:
                return
            self._why = self._why or AbortedError(reason)
            self._start_roll_back(reason)
        assert self._ending is not None
        await asyncio.shield(self._ending)

    def _start_roll_back(self, reason: str) -> None:
        """The decision is written here, in the same step that took it: nothing can come between."""
        was_frozen = self.state in {State.CUT_OVER, State.RESTORED}
        unwritten = ""
        try:
            self._host.journal.move(self.id, _SIDE, Event.ABORT, detail=reason[:1000])
        except MigrateError as error:
            if error.code != "journal":
                raise
            # COMMITTED is not there, so the container is this side's with ABORTED or without; a full disk must not
            # keep it frozen. The next start of the agent writes it.
            unwritten = str(error)
        self._ending = background.start(self._roll_back(reason, unwritten, was_frozen), f"{self.id}: roll-back")

    async def _roll_back(self, reason: str, unwritten: str, was_frozen: bool) -> None:
        live, self._workers = self._workers, None
        if live is not None:
            with contextlib.suppress(MigrateError):
                live.send_link(link.LinkAbort(migration=self.id, reason=reason[:1000]))
            await self._thaw_by_engine(live)
        failures = await asyncio.to_thread(undo.run_pending, self._host.state_dir, self.id, _SIDE)
        if live is not None:
            if was_frozen:
                await self._replay_packets(live)
            await live.close()
        failures += [unwritten] if unwritten else []
        if failures:
            raise InDoubtError(
                f"{self.container} runs here, but not all could be undone: {'; '.join(failures)}",
                host=self._host.name, hint="restart migrate-agent: it tries again",
            )  # fmt: skip

    async def _thaw_by_engine(self, live: Workers) -> None:
        try:
            async with asyncio.timeout(_THAW_TIMEOUT_S):
                await self._ask_to_thaw(live)
        except (MigrateError, TimeoutError) as error:
            _log.warning("%s: the engine did not thaw (%s); its end does", self.id, error or "no answer")
            with contextlib.suppress(ProcessLookupError):
                live.engine.process.kill()
            await live.engine.process.wait()

    async def _ask_to_thaw(self, live: Workers) -> None:
        """A failure may be that of an earlier request, so it is asked again: thawing twice is thawing once."""
        for _ in range(_THAW_ATTEMPTS - 1):
            try:
                await live.engine.ask(base.SourceThaw(), base.EngineDone)
            except PortClosedError:
                raise
            except MigrateError as error:
                _log.info("%s: %s, while it was to thaw", self.id, error)
            else:
                return
        await live.engine.ask(base.SourceThaw(), base.EngineDone)

    async def _replay_packets(self, live: Workers) -> None:
        """Give the container what was caught for it, so that no sender waits for its retransmission timer."""
        for interface in self._report.network.interfaces:
            if not interface.bridge:
                continue
            try:
                with capture.open_injector(interface.host_name) as inject:
                    async with asyncio.timeout(_THAW_TIMEOUT_S):
                        await live.stream.ask(
                            base.StreamReplay(), base.StreamReplayed, fds=[inject.fileno()], despite_failure=True
                        )
            except (MigrateError, OSError, TimeoutError) as error:
                _log.warning("%s: packets could not be replayed: %s", self.id, error)

    async def finish(self) -> None:
        """Wait until this side has cleaned up."""
        if self._ending is not None:
            await asyncio.shield(self._ending)

    async def settle(self, peer_state: State, peer_epoch: int) -> State:
        """The target's journal said `peer_state`, after this side was left in COMMITTED."""
        if self.state is State.COMMITTED and self._ending is None:
            if peer_state in reclaim.TARGET_RUNS and peer_epoch == self.epoch:
                self._host.journal.move(self.id, _SIDE, Event.RUNNING)
                self._ending = background.start(self._clean_up(), f"{self.id}: clean-up of the source")
            elif peer_state is State.DISCARDED or peer_epoch > self.epoch:
                live, self._workers = self._workers, None
                if live is not None:
                    # The engine must let go before tasks can be thawed or killed; its end leaves them frozen.
                    await live.close()
        if self._ending is not None:
            await asyncio.wait({self._ending})
        return await reclaim.settle_source(self._host, self.id, peer_state, peer_epoch)
