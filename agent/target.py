"""The target's side of one migration: objects are made and journalled here, the engine builds the container.

It runs the container after the source's COMMIT and at no other time.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import time

from agent import background, reclaim, undo
from agent.engine import base
from agent.host import Host
from agent.kernel.freezer import Freezer
from agent.kernel.urgent import Urgency
from agent.network import build
from agent.network.namespaces import is_named_namespace
from agent.runtimes.base import RuntimeContainer
from agent.source import failure_of
from agent.worker import Workers
from protocol import link_messages as link
from protocol import messages as m
from protocol.errors import AbortedError, MigrateError, UnsupportedError, UsageError
from protocol.states import Event, Side, State, may_abort, owner

_log = logging.getLogger(__name__)

_SIDE = Side.TARGET
# Packets that the source caught late are taken in for as long as it forwards them, and a little more.
_LISTEN_AFTER_RUNNING_S = 1.5


class TargetMigration:
    """One container on its way into this host."""

    side = _SIDE

    def __init__(self, host: Host, request: m.PrepareTarget, coordinator: str) -> None:
        self.id = request.migration
        self.epoch = request.epoch
        self.container = request.new_name
        self._host = host
        self._request = request
        self._coordinator = coordinator
        self._workers: Workers | None = None
        self._networks: list[build.BuiltNetwork] = []
        self._freezer: Freezer
        self._following: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._is_preparing = True
        self._prepared = asyncio.Event()
        # What ended the preparation; whatever fails after that is a consequence.
        self._why: MigrateError | None = None
        # What of the commit did not work, though the container runs.
        self._failed: MigrateError | None = None

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
            raise self._why or MigrateError(f"migration {self.id} has ended ({self.state.value})", code="ended")
        return self._workers

    # ------------------------------------------------------------ prepare

    async def prepare(self, peer_address: str) -> m.TargetPrepared:
        """Network, runtime objects, interception, listener. On failure nothing stays behind.

        `peer_address`: the only one from which the source may connect; '': any.
        """
        _check_address(peer_address, self._host.name)
        try:
            return await self._prepare(peer_address)
        finally:
            self._is_preparing = False
            self._prepared.set()

    async def _prepare(self, peer_address: str) -> m.TargetPrepared:
        self._host.journal.begin(
            migration=self.id, side=_SIDE, epoch=self.epoch, container=self.container,
            peer=self._request.source, coordinator=self._coordinator,
        )  # fmt: skip
        try:
            self._workers = await Workers.start(_SIDE, self._lost)
            listening = await self._live.stream.ask(
                base.StreamListen(
                    address=self._host.settings.listen_address[0], ports=self._host.settings.data_port_list,
                    client_public_key=self._request.client_public_key, peer_address=peer_address,
                    migration=self.id, epoch=self.epoch,
                ),
                base.StreamListening,
            )  # fmt: skip
            await self._make_container()
            _ = self._live  # nobody has ended it meanwhile
        except BaseException as error:
            self._is_preparing = False
            await self.abort(f"the target could not be prepared: {error}")
            raise
        self._following = background.start(self._follow(), f"{self.id}: the target")
        return m.TargetPrepared(port=listening.port, host_key=listening.host_key)

    async def _make_container(self) -> None:
        report = self._request.container
        runtime = self._host.runtime(report.runtime)
        if await asyncio.to_thread(runtime.find, self.container) is not None:
            raise UnsupportedError(
                f"there is a container {self.container} already", code="name-taken", host=self._host.name,
                hint="choose another with --name, or delete that one",
            )  # fmt: skip
        network = report.network
        host_name = f"mg{self.id[-10:]}"
        host_names = build.host_names_for(network, host_name)
        bring_network = self._request.keep_network and network.kind == "namespace"
        undo_steps = [undo.restore_config(report.bundle, undo.read_config(report.bundle))]
        if bring_network:
            # A namespace that was there before is somebody else's to remove.
            made_here = network.path if not is_named_namespace(network.path) else ""
            undo_steps.append(undo.remove_network(made_here, host_names))
        undo_steps.append(undo.delete_container(runtime.kind, runtime.root, self.container))
        self._host.journal.undo_ahead(self.id, _SIDE, *undo_steps)

        if bring_network and network.path:
            await self._build_network(network, host_name, pid=None)
        log_path = self._host.state_dir / "logs" / f"{self.container}.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        _ = self._live  # else it would be made for nobody
        undo.write_config(report.bundle, self._config_for_interception())
        made: RuntimeContainer = await asyncio.to_thread(
            lambda: runtime.create(
                self.container, report.bundle, log_path=str(log_path),
                monotonic_offset_ns=self._request.monotonic_offset_ns + report.monotonic_offset_ns,
            )
        )  # fmt: skip
        if bring_network and not network.path:
            await self._build_network(network, host_name, pid=made.pid)
        await self._live.engine.ask(
            base.TargetIntercept(pid=made.pid, start_argv=runtime.start_argv(self.container)), base.TargetIntercepted
        )
        undo.write_config(report.bundle, report.config_json.decode("utf-8"))
        self._freezer = Freezer.of(made.pid)
        if self._networks:
            self._live.stream.port.send(base.StreamInject(), [self._networks[0].inject_socket().fileno()])

    async def _build_network(self, network: m.Network, host_name: str, *, pid: int | None) -> None:
        built = await asyncio.to_thread(
            lambda: build.create_network(
                network, namespace_path=network.path or None, pid=pid,
                bridge=self._host.settings.network.bridge, host_name=host_name,
            )
        )  # fmt: skip
        self._networks.append(built)

    def _config_for_interception(self) -> str:
        """The source's config.json with one difference: it starts the binary that runs over there, as it is now.

        The engine stops it before its first instruction; what it was started with is replaced together with its memory.
        """
        config = json.loads(self._request.container.config_json)
        config["process"]["args"] = [self._request.container.executable]
        return json.dumps(config)

    # ------------------------------------------------------------ from the link to RUNNING

    async def _follow(self) -> None:
        """Go along with the source: link up, restored, commit."""
        live = self._live
        urgency = Urgency()
        try:
            await live.stream.inbox.get(base.StreamUp)
            self._host.journal.move(self.id, _SIDE, Event.ARMED)
            await live.link.get(link.LinkFreezing)
            urgency.begin()
            restored = await live.engine.inbox.get(base.TargetRestored)
            clock = time.monotonic_ns()
            facts = reclaim.facts_of_restored(
                self._freezer, restored, self._networks, self._host.settings.network.bridge
            )
            self._host.journal.move(self.id, _SIDE, Event.FREEZE, Event.RESTORED, facts=facts)
            parts = dict(restored.parts)
            parts["target journal restored"] = (time.monotonic_ns() - clock) / 1e6
            live.send_link(link.LinkRestored(migration=self.id, parts=parts, pids=restored.pids))
            commit = await live.link.get(link.LinkCommit)
            if commit.epoch != self.epoch:
                raise MigrateError(f"COMMIT of epoch {commit.epoch}, this is {self.epoch}", code="epoch")
            parts = self._run(restored)
            # Whatever fails from here on: it runs, and is to be cleaned up after.
            self._ending = background.start(self._clean_up(), f"{self.id}: clean-up of the target")
            live.send_link(link.LinkRunning(migration=self.id, parts=parts))
            # The source's catcher forwards until the network has learned; the container need not wait for this.
            for network in self._networks:
                network.announce()
            live.stream.port.send(base.StreamAttached())
        except MigrateError as error:
            _log.info("%s: %s", self.id, error)
            self._lost(error)
        except Exception as error:  # noqa: BLE001  (the source waits: it has to hear of this as of any failure)
            _log.exception("%s: the target failed", self.id)
            self._lost(MigrateError(f"the target failed: {type(error).__name__}: {error}", host=self._host.name))
        finally:
            urgency.end()

    def _run(self, restored: base.TargetRestored) -> dict[str, float]:
        """The commit: RUNNING on disk, then the effects, each of which may be repeated."""
        marks = [time.monotonic_ns()]

        def mark() -> None:
            marks.append(time.monotonic_ns())

        self._host.journal.move(self.id, _SIDE, Event.COMMIT, clear_undo=True)
        mark()
        try:
            for network in self._networks:
                network.attach()
            mark()
            reclaim.activate_sockets(restored.repaired)
            mark()
        except (MigrateError, OSError) as error:
            # It is owned here now: with a broken network it still has to run.
            _log.exception("%s: %s runs, but not all of it works", self.id, self.container)
            self._failed = MigrateError(
                f"{self.container} runs here, but not all of it works: {error}", code="commit-incomplete",
                host=self._host.name, hint=f"mend that, then: migrate recover {self.id}",
            )  # fmt: skip
        finally:
            self._freezer.thaw()
        mark()
        names = ("target journal running", "target network up", "target sockets", "target thaw")
        return {name: (end - start) / 1e6 for name, start, end in zip(names, marks, marks[1:], strict=False)}

    async def _clean_up(self) -> None:
        await asyncio.sleep(_LISTEN_AFTER_RUNNING_S)
        live, self._workers = self._workers, None
        if live is not None:
            await live.close()
        await self._close_networks()
        if self._failed is not None:
            raise self._failed  # the journal keeps RUNNING: what did not work is tried again by `settle` and at a start
        self._host.journal.move(self.id, _SIDE, Event.CLEANED)

    async def _close_networks(self) -> None:
        networks, self._networks = self._networks, []
        for network in networks:
            await asyncio.to_thread(network.close)  # it waits for the thread that announces

    # ------------------------------------------------------------ ending

    def _lost(self, error: MigrateError) -> None:
        """A process or the link failed. Before RESTORED that ends it; in RESTORED the source decides."""
        if self._is_preparing:
            self._why = self._why or error  # `prepare` meets it at its next step, and undoes what it did
            return
        if self._ending is not None:
            return
        state = self.state
        if state is State.RESTORED and error.code == "aborted-by-peer":
            self._start_discard(str(error))
        elif may_abort(_SIDE, state):
            _log.warning("%s: %s; discarding", self.id, error)
            if self._workers is not None:
                failed = link.LinkFailed(migration=self.id, failure=failure_of(error, self._host.name))
                with contextlib.suppress(MigrateError):
                    self._workers.send_link(failed)
            self._start_discard(str(error))

    async def abort(self, reason: str) -> None:
        """Discard. Raises: MigrateError: only the source may decide now."""
        if self._is_preparing:
            # What is being made cannot be removed before it is there; `prepare` removes it.
            self._why = self._why or AbortedError(reason)
            await self._prepared.wait()
        state = self.state
        if owner(state) is _SIDE:
            raise MigrateError(
                f"{self.id} is past its commit point ({state.value}): {self.container} is owned here", code="committed",
                host=self._host.name, hint=f"migrate status {self.id}",
            )  # fmt: skip
        if self._ending is None:
            if state is State.DISCARDED:
                return
            if not may_abort(_SIDE, state):
                raise MigrateError(
                    f"{self.id} is {state.value} here: the source decides now", code="committed",
                    host=self._host.name, hint=f"migrate recover {self.id}",
                )  # fmt: skip
            self._start_discard(reason)
        assert self._ending is not None
        await asyncio.shield(self._ending)

    def _start_discard(self, reason: str) -> None:
        """The decision is written here, in the same step that took it: nothing can come between."""
        unwritten = []
        try:
            self._host.journal.move(self.id, _SIDE, Event.ABORT, detail=reason[:1000])
        except MigrateError as error:
            if error.code != "journal":
                raise
            # It does not run here with DISCARDED or without; the next start of the agent writes it.
            unwritten = [str(error)]
        self._ending = background.start(self._discard(unwritten), f"{self.id}: discarding the target")

    async def _discard(self, unwritten: list[str]) -> None:
        live, self._workers = self._workers, None
        if live is not None:
            # The tasks die with their tracer (EXITKILL); frozen ones are killed by the runtime's delete.
            await live.close()
        await self._close_networks()
        failures = await asyncio.to_thread(undo.run_pending, self._host.state_dir, self.id, _SIDE)
        failures += unwritten
        if failures:
            raise reclaim.left_behind(self._host, self.id, failures)

    async def finish(self) -> None:
        """Wait until this side has cleaned up."""
        if self._following is not None:
            await asyncio.wait({self._following})
        if self._ending is not None:
            await asyncio.shield(self._ending)

    async def settle(self, peer_state: State | None, *, source_is_dead: bool) -> State:
        """The source's journal said `peer_state`, after this side was left in RESTORED."""
        if self._ending is not None:
            await asyncio.wait({self._ending})
        decides = source_is_dead or peer_state in reclaim.SOURCE_GAVE | reclaim.SOURCE_KEPT
        if self.state is State.RESTORED and decides:
            if self._following is not None:
                self._following.cancel()
            live, self._workers = self._workers, None
            if live is not None:
                await live.close()
            await self._close_networks()
        return await reclaim.settle_target(self._host, self.id, peer_state, source_is_dead=source_is_dead)


def _check_address(text: str, host: str) -> None:
    """Raises: UsageError: it is not '' and no IP address."""
    if text:
        try:
            ipaddress.ip_address(text)
        except ValueError as error:
            raise UsageError(f"the source's address {text[:100]!r} is not an IP address", host=host) from error
