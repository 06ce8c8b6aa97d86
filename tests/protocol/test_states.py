"""The state table alone, and two sides of it together: messages lost, repeated, out of order; agents and hosts that
die at any moment, also between a journal record and the effect that it announces."""

from __future__ import annotations

import enum
import itertools
from collections import deque
from dataclasses import dataclass, replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import LocalProtocolError
from protocol.states import (
    FINAL,
    REPEATS,
    TRANSITIONS,
    Event,
    Side,
    State,
    is_repeat,
    may_abort,
    next_state,
    owner,
)

S, T = Side.SOURCE, Side.TARGET
SOURCE_MAY_RUN = {State.PREPARING, State.PRECOPY, State.ABORTED, State.RECLAIMED}
TARGET_MAY_RUN = {State.RUNNING, State.FINISHED, State.FORCED}

# ---------------------------------------------------------------- the table alone

OWNER = {
    State.PREPARING: S,
    State.PRECOPY: S,
    State.CUT_OVER: S,
    State.RESTORED: S,
    State.COMMITTED: T,
    State.RUNNING: T,
    State.RECLAIMED: S,
    State.FINISHED: T,
    State.ABORTED: S,
    State.DISCARDED: S,
    State.FORCED: T,
    State.SUPERSEDED: T,
}
EARLY = {State.PREPARING, State.PRECOPY, State.CUT_OVER}
MAY_ABORT = {S: EARLY | {State.RESTORED}, T: EARLY}
MAY_ABORT_WITHOUT_TASKS = {S: EARLY - {State.CUT_OVER}, T: EARLY | {State.RESTORED}}


@pytest.mark.parametrize("state", State)
def test_every_state_has_its_owner(state):
    assert owner(state) is OWNER[state]


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("side", Side)
def test_every_state_says_whether_its_side_may_abort_alone(side, state):
    assert may_abort(side, state) is (state in MAY_ABORT[side])
    assert may_abort(side, state, tasks_alive=False) is (state in MAY_ABORT_WITHOUT_TASKS[side])


@pytest.mark.parametrize(("side", "state", "event"), list(itertools.product(Side, State, Event)))
def test_what_is_not_in_the_table_is_illegal(side, state, event):
    if (side, state, event) in TRANSITIONS:
        assert next_state(side, state, event) is TRANSITIONS[side, state, event]
    else:
        with pytest.raises(LocalProtocolError, match=state.value):
            next_state(side, state, event)


def test_every_event_moves_something_and_every_state_is_entered():
    assert {event for _, _, event in TRANSITIONS} == set(Event)
    assert set(TRANSITIONS.values()) | {State.PREPARING} == set(State)


def test_only_a_higher_epoch_ends_a_final_state():
    leaving = {(side, state, event) for side, state, event in TRANSITIONS if state in FINAL}
    assert leaving == {(S, State.ABORTED, Event.HIGHER_EPOCH)}


def test_a_repeat_is_no_transition():
    assert not REPEATS & TRANSITIONS.keys()
    for side, state, event in REPEATS:
        assert is_repeat(side, state, event)
        with pytest.raises(LocalProtocolError):
            next_state(side, state, event)


def test_the_owner_changes_by_the_records_of_the_commit_point_and_no_others():
    changing = {(side, state, event) for (side, state, event), to in TRANSITIONS.items() if owner(state) != owner(to)}
    assert changing == {
        (S, State.RESTORED, Event.COMMIT),
        (S, State.COMMITTED, Event.TARGET_DISCARDED),
        (T, State.RESTORED, Event.COMMIT),
        (T, State.RESTORED, Event.SOURCE_IS_DEAD),
        (S, State.CUT_OVER, Event.HIGHER_EPOCH),
        (S, State.RESTORED, Event.HIGHER_EPOCH),
        (S, State.ABORTED, Event.HIGHER_EPOCH),
    }


# ---------------------------------------------------------------- both sides together


class Tasks(enum.Enum):
    """What the tasks of one side's copy do."""

    NONE = "none"  # not built, killed, or gone with their host
    FROZEN = "frozen"  # whole
    RUNNING = "running"


@dataclass(frozen=True)
class World:
    """Two journals, the tasks of both copies, and all that was ever said.

    A state that was said may be heard at any later time, any number of times, or never: that covers loss, repetition,
    reordering, the relay by the coordinator, and an agent that asks again after a restart.
    """

    source: State = State.PREPARING
    target: State = State.PREPARING
    source_tasks: Tasks = Tasks.RUNNING
    target_tasks: Tasks = Tasks.NONE
    said: frozenset[tuple[Side, State]] = frozenset()
    source_host_died: bool = False
    stop_broken: bool = False  # the tracer died in the freeze: the source's tasks have run on since its last scan

    def record(self, side, event):
        """The journal record (fsync), then the message that tells it."""
        state = next_state(side, self.source if side is S else self.target, event)
        said = self.said | {(side, state)}
        return replace(self, source=state, said=said) if side is S else replace(self, target=state, said=said)


# What a journal record asks of the tasks: done after it, and again at every start of the agent.
SOURCE_EFFECT = {
    State.CUT_OVER: Tasks.FROZEN,  # by ptrace
    State.RESTORED: Tasks.FROZEN,  # by the cgroup
    State.ABORTED: Tasks.RUNNING,
    State.RECLAIMED: Tasks.RUNNING,
    State.RUNNING: Tasks.NONE,
    State.SUPERSEDED: Tasks.NONE,
}
TARGET_EFFECT = {State.RUNNING: Tasks.RUNNING, State.FORCED: Tasks.RUNNING, State.DISCARDED: Tasks.NONE}

# What a state of the peer means to a side that hears it.
HEARD = {
    S: {
        State.RESTORED: Event.RESTORED,
        State.RUNNING: Event.RUNNING,
        State.FINISHED: Event.RUNNING,
        State.DISCARDED: Event.TARGET_DISCARDED,
        State.FORCED: Event.HIGHER_EPOCH,
    },
    T: {
        State.CUT_OVER: Event.FREEZE,
        State.COMMITTED: Event.COMMIT,
        State.RUNNING: Event.COMMIT,
        State.ABORTED: Event.ABORT,
    },
}


@cache
def moves(world):
    """Every next world that needs no host to die, by name. An agent that dies and starts again changes nothing here:
    journal and tasks stay, so that 'dead for good' is a walk in which its moves are not taken."""
    return {**_source_moves(world), **_target_moves(world)}


def _source_moves(world):
    found = {}
    alive = world.source_tasks is not Tasks.NONE
    settled = SOURCE_EFFECT.get(world.source, world.source_tasks) is world.source_tasks or not alive
    if not settled and not (world.source is State.CUT_OVER and world.stop_broken):
        found["source effect"] = replace(world, source_tasks=SOURCE_EFFECT[world.source])
    if world.source is State.CUT_OVER and world.source_tasks is Tasks.FROZEN:
        found["source's tracer dies"] = replace(world, source_tasks=Tasks.RUNNING, stop_broken=True)
    if alive and world.source is State.PREPARING:
        found["source armed"] = world.record(S, Event.ARMED)
    if alive and world.source is State.PRECOPY:
        found["source freezes"] = world.record(S, Event.FREEZE)
    if alive and settled and world.source is State.RESTORED and not world.stop_broken:
        found["source commits"] = world.record(S, Event.COMMIT)
    if may_abort(S, world.source, tasks_alive=alive):
        found["source aborts"] = world.record(S, Event.ABORT)
    if settled and world.source is State.RUNNING:
        found["source cleaned"] = world.record(S, Event.CLEANED)
    for state in (state for side, state in world.said if side is T):
        event = HEARD[S].get(state)
        if (S, world.source, event) in TRANSITIONS and (alive or event is not Event.RESTORED):
            found[f"source hears {state.value}"] = world.record(S, event)
        elif state is State.DISCARDED and (S, world.source, Event.ABORT) in TRANSITIONS:
            found["source aborts, for the target has discarded"] = world.record(S, Event.ABORT)
    return found


def _target_moves(world):
    found = {}
    settled = TARGET_EFFECT.get(world.target, world.target_tasks) is world.target_tasks
    if not settled and (world.target_tasks is not Tasks.NONE):
        found["target effect"] = replace(world, target_tasks=TARGET_EFFECT[world.target])
    if world.target is State.PREPARING:
        found["target armed"] = world.record(T, Event.ARMED)
    # It is whole only if the source's last pages came: the source was frozen, and lived to send them.
    if world.target is State.CUT_OVER and world.target_tasks is Tasks.NONE and world.source_tasks is Tasks.FROZEN:
        found["target built"] = replace(world, target_tasks=Tasks.FROZEN)
    if world.target is State.CUT_OVER and world.target_tasks is Tasks.FROZEN:
        found["target restored"] = world.record(T, Event.RESTORED)
    if may_abort(T, world.target, tasks_alive=world.target_tasks is not Tasks.NONE):
        found["target discards"] = world.record(T, Event.ABORT)
    if world.target is State.RESTORED and world.source_host_died and world.target_tasks is Tasks.FROZEN:
        found["a person says that the source is dead"] = world.record(T, Event.SOURCE_IS_DEAD)
    if settled and world.target in {State.RUNNING, State.FORCED}:
        found["target cleaned"] = world.record(T, Event.CLEANED)
    for state in (state for side, state in world.said if side is S):
        event = HEARD[T].get(state)
        # With its tasks gone it settles first: it has nothing to run.
        has_tasks = event is not Event.COMMIT or world.target_tasks is Tasks.FROZEN
        if (T, world.target, event) in TRANSITIONS and has_tasks:
            found[f"target hears {state.value}"] = world.record(T, event)
    return found


@cache
def deaths(world):
    """Hosts that lose power. Of a host whose copy runs, the container dies as it does without us: not looked at."""
    found = {}
    if world.source_tasks is Tasks.FROZEN:
        found["source host dies"] = replace(world, source_tasks=Tasks.NONE, source_host_died=True)
    if world.target_tasks is Tasks.FROZEN:
        found["target host dies"] = replace(world, target_tasks=Tasks.NONE)
    return found


@cache
def reachable():
    """All worlds, each with a way to it."""
    start = World()
    ways: dict[World, tuple[str, ...]] = {start: ()}
    queue = deque([start])
    while queue:
        world = queue.popleft()
        for name, after in {**moves(world), **deaths(world)}.items():
            if after not in ways:
                ways[after] = (*ways[world], name)
                queue.append(after)
    return ways


def running_copies(world):
    return (world.source_tasks is Tasks.RUNNING) + (world.target_tasks is Tasks.RUNNING)


def whole_copies(world):
    """Copies that may still become the one that runs, with nothing lost; the target's from its record RESTORED on."""
    target_ran = world.target in TARGET_MAY_RUN
    source_ran_on = world.source in {State.ABORTED, State.RECLAIMED}
    source_whole = world.source_tasks is not Tasks.NONE and not target_ran
    target_holds = world.target in TARGET_MAY_RUN | {State.RESTORED}
    target_whole = world.target_tasks is not Tasks.NONE and target_holds and not source_ran_on
    return source_whole + target_whole


def check_world(world, way):
    assert running_copies(world) <= 1, f"two copies run after {way}"
    if world.source_tasks is Tasks.RUNNING:
        # Between the record and the freeze, or with its tracer dead, it runs on; so it must not have committed.
        not_held = world.source in {State.CUT_OVER, State.RESTORED}
        assert world.source in SOURCE_MAY_RUN or not_held, f"the source runs in {world.source} after {way}"
    if world.target_tasks is Tasks.RUNNING:
        assert world.target in TARGET_MAY_RUN, f"the target runs in {world.target} after {way}"


def test_in_no_reachable_world_two_copies_run():
    for world, way in reachable().items():
        check_world(world, way)


def test_every_state_is_reached_on_its_side():
    worlds = reachable()
    for side in Side:
        in_table = {to for (row_side, _, _), to in TRANSITIONS.items() if row_side is side} | {State.PREPARING}
        assert {world.source if side is S else world.target for world in worlds} == in_table


def test_every_row_of_the_table_is_taken():
    taken = set()
    for world in reachable():
        for after in moves(world).values():
            for side, before, now in ((S, world.source, after.source), (T, world.target, after.target)):
                taken.add((side, before, now))
    assert {(side, state, to) for (side, state, _), to in TRANSITIONS.items()} <= taken


def test_no_step_of_ours_destroys_the_last_whole_copy():
    for world, way in reachable().items():
        for name, after in moves(world).items():
            if whole_copies(world):
                assert whole_copies(after), f"{name} loses the container after {way}"


def test_from_every_world_with_a_whole_copy_there_is_a_way_to_one_running_copy():
    good = {world for world in reachable() if running_copies(world) == 1 and whole_copies(world) == 1}
    before: dict[World, set[World]] = {}
    for world in reachable():
        for after in moves(world).values():
            before.setdefault(after, set()).add(world)
    queue = deque(good)
    while queue:
        for earlier in before.get(queue.popleft(), ()):
            if earlier not in good:
                good.add(earlier)
                queue.append(earlier)
    stuck = [way for world, way in reachable().items() if whole_copies(world) and world not in good]
    assert not stuck


def test_where_nothing_moves_any_more_both_sides_have_settled():
    for world, way in reachable().items():
        if not moves(world) and whole_copies(world):
            assert running_copies(world) == 1, f"stuck after {way}"
            assert owner(world.source) is owner(world.target) or world.source_host_died, way


def test_a_source_whose_stop_was_broken_never_commits():
    for world in reachable():
        assert not (world.stop_broken and world.source in {State.COMMITTED, State.RUNNING, State.RECLAIMED})


def test_one_witness_of_committed_is_enough_when_the_source_is_gone():
    worlds = [
        world
        for world in reachable()
        if (world.source, world.target) == (State.COMMITTED, State.RESTORED)
        and (world.source_tasks, world.target_tasks) == (Tasks.NONE, Tasks.FROZEN)
    ]
    assert worlds
    for world in worlds:
        heard = moves(world)["target hears committed"]
        assert moves(heard)["target effect"].target_tasks is Tasks.RUNNING


def test_a_source_that_came_back_from_the_dead_gives_way_to_the_forced_target():
    worlds = [
        world
        for world in reachable()
        if world.target is State.FORCED and world.source in MAY_ABORT[S] | {State.COMMITTED}
    ]
    assert worlds
    for world in worlds:
        assert moves(world)["source hears forced"].source is State.SUPERSEDED


@given(data=st.data())
def test_a_random_walk_keeps_one_owner_to_its_end(data):
    world, way = World(), []
    for _ in range(40):
        choices = {**moves(world), **deaths(world)}
        if not choices:
            break
        name = data.draw(st.sampled_from(sorted(choices)))
        way.append(name)
        world = choices[name]
        check_world(world, way)
