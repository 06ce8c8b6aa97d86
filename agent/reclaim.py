"""What happens after the commit point, by facts of the journal alone: it works in a fresh agent as well.

Source: kill the frozen copy and forget the container. Target: let it run. Both are idempotent, because a crash may
fall between any two steps.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from agent import undo
from agent.engine import base
from agent.engine.native import files as engine_files
from agent.host import Host
from agent.journal import Entry, Undo
from agent.kernel import pidfd
from agent.kernel.freezer import Freezer
from agent.network import build, cut
from agent.runtimes.oci import open_runtime
from protocol.errors import InDoubtError, MigrateError, TaskGoneError, UsageError
from protocol.messages import ContainerReport, Interface
from protocol.states import TRANSITIONS, Event, Side, State, may_abort

_log = logging.getLogger(__name__)

# What a target's journal says when the container runs, or ran, there.
TARGET_RUNS = frozenset({State.RUNNING, State.FINISHED, State.FORCED})
# What a source's journal says when it has given the container away, and when it has it back.
SOURCE_GAVE = frozenset({State.COMMITTED, State.RUNNING, State.FINISHED})
SOURCE_KEPT = frozenset({State.ABORTED, State.RECLAIMED})
# Dead tasks are reaped by their parent or tracer in milliseconds.
_DEATH_TIMEOUT_S = 10.0


# ---------------------------------------------------------------- source


def facts_of_source(
    host: Host, report: ContainerReport, freezer: Freezer, interfaces: Sequence[Interface]
) -> dict[str, Any]:
    """All that the functions below need, for the journal."""
    runtime = host.runtime(report.runtime)
    return {
        "freezer": freezer.paths,
        "pids": [report.pid],
        "runtime": [runtime.kind, runtime.root, report.name],
        "cuts": [undo.uncut(interface).arguments for interface in interfaces],
        "namespace": report.network.path if interfaces else "",
    }


def kill_source_copy(facts: Mapping[str, Any]) -> None:
    """SIGKILL every task while it is frozen, then thaw: no user instruction runs in between. Source: KERNEL-FACTS."""
    try:
        freezer = Freezer.at(facts["freezer"])
        for pid in freezer.processes():
            try:
                handle = pidfd.pidfd_open(pid)
            except TaskGoneError:
                continue
            try:
                pidfd.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)
        freezer.thaw()
    except TaskGoneError:
        _log.info("the cgroup of the source's copy is gone")


def delete_source_container(facts: Mapping[str, Any]) -> None:
    """Forget it in the runtime; waits until its tasks are gone."""
    kind, root, name = facts["runtime"]
    runtime = open_runtime(kind, root)
    deadline = time.monotonic() + _DEATH_TIMEOUT_S
    while True:
        try:
            runtime.delete(name)
        except MigrateError:
            if time.monotonic() > deadline:
                raise
            # runc refuses while dead tasks wait for their tracer; there is no event to wait for.
            time.sleep(0.05)
        else:
            return


def forget_source_network(facts: Mapping[str, Any]) -> None:
    """Remove catchers, veths and the named namespace: they live on the target now."""
    for names in facts["cuts"]:
        cut.remove_catcher(names["catcher"])
    build.remove_network(facts["namespace"], *(names["host_name"] for names in facts["cuts"]))


async def settle_source(host: Host, migration: str, peer_state: State, peer_epoch: int) -> State:
    """The target's journal says `peer_state` in `peer_epoch`; end this side accordingly.

    Raises: InDoubtError: that state decides nothing.
    """
    entry = host.journal.find(migration, Side.SOURCE)
    if entry is None:
        raise UsageError(f"no migration {migration} on {host.name} as source", host=host.name)
    runs_there = peer_state in TARGET_RUNS
    if runs_there and peer_epoch > entry.epoch and (Side.SOURCE, entry.state, Event.HIGHER_EPOCH) in TRANSITIONS:
        # Somebody declared this host dead and let the target run: this copy must go, even if it runs.
        state = host.journal.move(migration, Side.SOURCE, Event.HIGHER_EPOCH, epoch=peer_epoch, clear_undo=True)
        await _remove_source_copy(entry.facts)
        return state
    if entry.state is State.RUNNING or (entry.state is State.COMMITTED and runs_there):
        if entry.state is State.COMMITTED:
            host.journal.move(migration, Side.SOURCE, Event.RUNNING)
        await _remove_source_copy(entry.facts)
        return host.journal.move(migration, Side.SOURCE, Event.CLEANED)
    if entry.state is State.COMMITTED and peer_state is State.DISCARDED:
        state = host.journal.move(migration, Side.SOURCE, Event.TARGET_DISCARDED, undo=undo_of_committed(entry.facts))
        await _take_back(host, entry, "was reclaimed")
        return state
    frozen_here = entry.state in {State.CUT_OVER, State.RESTORED}
    if frozen_here and peer_state is State.DISCARDED and not tasks_alive(entry.facts):
        # So left by a start of the agent that found no tasks; the target's copy is gone as well.
        state = host.journal.move(migration, Side.SOURCE, Event.ABORT, detail="both copies are gone")
        await _take_back(host, entry, "was aborted")
        return state
    if entry.is_final:
        return entry.state
    raise InDoubtError(
        f"{host.name} is {entry.state.value}, the target {peer_state.value}: nothing to settle yet", host=host.name,
        hint=f"migrate recover {migration}, when the target has decided",
    )  # fmt: skip


async def _take_back(host: Host, entry: Entry, what: str) -> None:
    failures = await asyncio.to_thread(undo.run_pending, host.state_dir, entry.migration, entry.side)
    if failures:
        raise InDoubtError(
            f"{entry.container} {what}, but not all could be undone: {'; '.join(failures)}", host=host.name,
            hint="restart migrate-agent: it tries again",
        )  # fmt: skip


async def _remove_source_copy(facts: Mapping[str, Any]) -> None:
    """Its network first: with its engine gone its sockets may be out of repair mode, and their end would be heard."""
    await asyncio.to_thread(forget_source_network, facts)
    await asyncio.to_thread(kill_source_copy, facts)
    await asyncio.to_thread(delete_source_container, facts)


def undo_of_committed(facts: Mapping[str, Any]) -> list[Undo]:
    """How a frozen source that was committed is taken back into service, after the target discarded."""
    return [
        undo.thaw(facts["freezer"]),
        undo.repair_off(facts["pids"]),
        *(Undo("uncut", names) for names in facts["cuts"]),
    ]


# ---------------------------------------------------------------- target


def facts_of_restored(
    freezer: Freezer, restored: base.TargetRestored, networks: Sequence[build.BuiltNetwork], bridge: str
) -> dict[str, Any]:
    """All that `run_target` needs, for the journal."""
    return {
        "freezer": freezer.paths,
        "repaired": [
            [socket.pid, socket.fd, base64.b64encode(socket.unsent).decode("ascii")] for socket in restored.repaired
        ],
        "host_names": [name for network in networks for name in network.host_names],
        "bridge": bridge,
    }


def activate_sockets(sockets: Sequence[base.RepairedSocket]) -> None:
    """Out of repair mode, with the window probe that makes the peer talk, then the data that had not been sent."""
    for socket in sockets:
        engine_files.activate(socket)


def run_target(facts: Mapping[str, Any]) -> None:
    """What COMMIT means, for an agent that was started anew: attach, activate, and thaw whatever those two did.

    Raises: MigrateError: it runs, and what does not work; call it again when that is mended.
    """
    try:
        for host_name in facts["host_names"]:
            build.attach_by_name(host_name, facts["bridge"])
        activate_sockets(
            [
                base.RepairedSocket(pid=pid, fd=fd, unsent=base64.b64decode(unsent))
                for pid, fd, unsent in facts["repaired"]
            ]
        )
    finally:
        # Nobody else has a copy that may run.
        Freezer.at(facts["freezer"]).thaw()


async def settle_target(host: Host, migration: str, peer_state: State | None, *, source_is_dead: bool) -> State:
    """The source's journal says `peer_state`; end this side accordingly.

    Raises: InDoubtError: that state decides nothing.
    """
    entry = host.journal.find(migration, Side.TARGET)
    if entry is None:
        raise UsageError(f"no migration {migration} on {host.name} as target", host=host.name)
    if entry.state is State.RESTORED and peer_state in SOURCE_KEPT:
        # First of all: a source that is known to run must never be overruled by 'the source is dead'.
        state = host.journal.move(migration, Side.TARGET, Event.ABORT, detail="the source aborted")
        failures = await asyncio.to_thread(undo.run_pending, host.state_dir, migration, Side.TARGET)
        if failures:
            raise left_behind(host, migration, failures)
        return state
    committed = peer_state in SOURCE_GAVE
    if entry.state is State.RESTORED and (committed or source_is_dead):
        if committed:
            host.journal.move(migration, Side.TARGET, Event.COMMIT, clear_undo=True)
        else:
            host.journal.move(migration, Side.TARGET, Event.SOURCE_IS_DEAD, clear_undo=True, epoch=entry.epoch + 1)
        await asyncio.to_thread(run_target, entry.facts)
        return host.journal.move(migration, Side.TARGET, Event.CLEANED)
    if entry.state in {State.RUNNING, State.FORCED}:
        await asyncio.to_thread(run_target, entry.facts)
        return host.journal.move(migration, Side.TARGET, Event.CLEANED)
    if entry.is_final:
        return entry.state
    raise InDoubtError(
        f"{host.name} is {entry.state.value}, the source {peer_state.value if peer_state else 'unknown'}: "
        "nothing to settle yet", host=host.name, hint=f"migrate recover {migration}, when the source can be asked",
    )  # fmt: skip


def left_behind(host: Host, migration: str, failures: Sequence[str]) -> MigrateError:
    """Of a discarded target some things are still there."""
    return MigrateError(
        f"{migration} was discarded, but not all could be removed: {'; '.join(failures)}",
        code="left-behind", host=host.name, hint="restart migrate-agent: it tries again",
    )  # fmt: skip


# ---------------------------------------------------------------- at agent start


async def settle_at_start(host: Host) -> list[str]:
    """Settle what an agent that died left behind, before anything else may start those containers.

    Gives what a person should know, one line each. Sides that need the other one's word stay as they are.
    """
    said = []
    for entry in host.journal.unsettled():
        try:
            if not host.journal.adopt(entry.migration, entry.side):
                continue  # another agent is at it
            said.append(await _settle_one(host, entry))
        except (MigrateError, OSError) as error:
            said.append(f"{entry.migration}: {error}")
        except (LookupError, TypeError, ValueError) as error:
            # Written by another version, perhaps; one such record must not keep the agent from all others.
            said.append(
                f"{entry.migration}: {entry.side.value} {entry.state.value} of {entry.container}: its record is not "
                f"understood ({type(error).__name__}: {error})"
            )
    return [line for line in said if line]


async def _settle_one(host: Host, entry: Entry) -> str:
    migration, side, state = entry.migration, entry.side, entry.state
    if entry.is_final:
        return await _undo_rest(host, entry)
    alive = tasks_alive(entry.facts)
    match side, state:
        case Side.SOURCE, State.COMMITTED:
            return f"{migration}: committed, the copy here stays frozen until the target is heard: migrate recover"
        case Side.SOURCE, State.RUNNING:
            await settle_source(host, migration, State.RUNNING, entry.epoch)
            return f"{migration}: cleaned up after success"
        case Side.TARGET, State.RUNNING | State.FORCED:
            await settle_target(host, migration, None, source_is_dead=False)
            return f"{migration}: {entry.container} runs here"
    if not may_abort(side, state, tasks_alive=alive):
        return f"{migration}: {state.value} here, the other side must be heard: migrate recover {migration}"
    host.journal.move(migration, side, Event.ABORT, detail="the agent was restarted")
    return await _undo_rest(host, entry)


async def _undo_rest(host: Host, entry: Entry) -> str:
    failures = await asyncio.to_thread(undo.run_pending, host.state_dir, entry.migration, entry.side)
    return f"{entry.migration}: undone" + (f", except {'; '.join(failures)}" if failures else "")


def tasks_alive(facts: Mapping[str, Any]) -> bool:
    """Whether this side's copy has tasks. True before the journal knows of a copy."""
    if "freezer" not in facts:
        return True
    try:
        return bool(Freezer.at(facts["freezer"]).processes())
    except TaskGoneError:
        return False
