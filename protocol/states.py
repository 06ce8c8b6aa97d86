"""THE migration machine: one table, and who owns the container in each state.

Both agents keep a state of their own for one migration, in their journal (fsync). What is not in the table is
illegal. The decision is the source's record COMMITTED: up to there the source owns the container, from there the
target does.
"""

from __future__ import annotations

import enum
from typing import assert_never

from protocol.errors import LocalProtocolError


class Side(enum.Enum):
    """One of the two agents of a migration."""

    SOURCE = "source"
    TARGET = "target"


class State(enum.Enum):
    """Where one side of a migration stands."""

    PREPARING = "preparing"  # both: objects are made, links opened
    PRECOPY = "precopy"  # both: memory is copied while the container runs
    CUT_OVER = "cut-over"  # source: the container is frozen; target: the final state is being applied
    RESTORED = "restored"  # target: whole, frozen, waiting; source: has heard so
    COMMITTED = "committed"  # source: the target owns the container; its own copy stays frozen
    RUNNING = "running"  # target: thawed; source: has heard so, and may delete its copy
    RECLAIMED = "reclaimed"  # source: the target discarded after COMMITTED, proven by its journal
    FINISHED = "finished"  # both: cleaned up after success
    ABORTED = "aborted"  # source: undone, the container runs here
    DISCARDED = "discarded"  # target: everything removed, it never ran here
    FORCED = "forced"  # target: made to run by a person who declared the source dead
    SUPERSEDED = "superseded"  # source: met the higher epoch of FORCED; what was left of its copy is killed


class Event(enum.Enum):
    """What moves a side on."""

    ARMED = "armed"
    FREEZE = "freeze"
    RESTORED = "restored"
    COMMIT = "commit"
    RUNNING = "running"
    ABORT = "abort"
    TARGET_DISCARDED = "target-discarded"
    CLEANED = "cleaned"
    SOURCE_IS_DEAD = "source-is-dead"
    HIGHER_EPOCH = "higher-epoch"


_SOURCE = Side.SOURCE
_TARGET = Side.TARGET

TRANSITIONS: dict[tuple[Side, State, Event], State] = {
    (_SOURCE, State.PREPARING, Event.ARMED): State.PRECOPY,
    (_SOURCE, State.PREPARING, Event.ABORT): State.ABORTED,
    (_SOURCE, State.PRECOPY, Event.FREEZE): State.CUT_OVER,
    (_SOURCE, State.PRECOPY, Event.ABORT): State.ABORTED,
    (_SOURCE, State.CUT_OVER, Event.RESTORED): State.RESTORED,
    (_SOURCE, State.CUT_OVER, Event.ABORT): State.ABORTED,
    (_SOURCE, State.RESTORED, Event.COMMIT): State.COMMITTED,
    (_SOURCE, State.RESTORED, Event.ABORT): State.ABORTED,
    (_SOURCE, State.COMMITTED, Event.RUNNING): State.RUNNING,
    (_SOURCE, State.COMMITTED, Event.TARGET_DISCARDED): State.RECLAIMED,
    (_SOURCE, State.RUNNING, Event.CLEANED): State.FINISHED,
    # A source that was declared dead and was not: FORCED is reached from RESTORED only, so it had frozen by then.
    (_SOURCE, State.CUT_OVER, Event.HIGHER_EPOCH): State.SUPERSEDED,
    (_SOURCE, State.RESTORED, Event.HIGHER_EPOCH): State.SUPERSEDED,
    (_SOURCE, State.COMMITTED, Event.HIGHER_EPOCH): State.SUPERSEDED,
    (_SOURCE, State.ABORTED, Event.HIGHER_EPOCH): State.SUPERSEDED,
    (_TARGET, State.PREPARING, Event.ARMED): State.PRECOPY,
    (_TARGET, State.PREPARING, Event.ABORT): State.DISCARDED,
    (_TARGET, State.PRECOPY, Event.FREEZE): State.CUT_OVER,
    (_TARGET, State.PRECOPY, Event.ABORT): State.DISCARDED,
    (_TARGET, State.CUT_OVER, Event.RESTORED): State.RESTORED,
    (_TARGET, State.CUT_OVER, Event.ABORT): State.DISCARDED,
    (_TARGET, State.RESTORED, Event.COMMIT): State.RUNNING,
    (_TARGET, State.RESTORED, Event.ABORT): State.DISCARDED,
    (_TARGET, State.RESTORED, Event.SOURCE_IS_DEAD): State.FORCED,
    (_TARGET, State.RUNNING, Event.CLEANED): State.FINISHED,
    (_TARGET, State.FORCED, Event.CLEANED): State.FINISHED,
}

FINAL = frozenset({State.FINISHED, State.ABORTED, State.DISCARDED, State.RECLAIMED, State.SUPERSEDED})

# What is heard again after it took effect: COMMITTED has two witnesses (data link and coordinator), and every side
# tells its state anew after a link was lost. Nothing is to be written or done; the answer is the own state.
REPEATS: frozenset[tuple[Side, State, Event]] = frozenset(
    {
        (_SOURCE, State.RESTORED, Event.RESTORED),
        (_SOURCE, State.COMMITTED, Event.RESTORED),
        (_SOURCE, State.RUNNING, Event.RUNNING),
        (_SOURCE, State.FINISHED, Event.RUNNING),
        (_SOURCE, State.ABORTED, Event.ABORT),
        (_SOURCE, State.ABORTED, Event.TARGET_DISCARDED),
        (_SOURCE, State.RECLAIMED, Event.TARGET_DISCARDED),
        (_SOURCE, State.SUPERSEDED, Event.HIGHER_EPOCH),
        (_TARGET, State.RUNNING, Event.COMMIT),
        (_TARGET, State.FINISHED, Event.COMMIT),
        (_TARGET, State.FORCED, Event.SOURCE_IS_DEAD),
        (_TARGET, State.DISCARDED, Event.ABORT),
    }
)


def next_state(side: Side, state: State, event: Event) -> State:
    """The state after `event`.

    Raises: LocalProtocolError: the table does not have it.
    """
    try:
        return TRANSITIONS[side, state, event]
    except KeyError:
        raise LocalProtocolError(f"illegal on the {side.value}: {event.value} in state {state.value}") from None


def is_repeat(side: Side, state: State, event: Event) -> bool:
    """Whether `event` has taken effect already, so that hearing it again in `state` changes nothing."""
    return (side, state, event) in REPEATS


def owner(state: State) -> Side:
    """Who owns the container, as far as the side in `state` knows.

    An agent that says RUNNING or FORCED owns it on the target; ABORTED, RECLAIMED and everything up to RESTORED
    leave it with the source. DISCARDED says that it is not the target.
    """
    match state:
        case State.COMMITTED | State.RUNNING | State.FINISHED | State.FORCED | State.SUPERSEDED:
            return Side.TARGET
        case (
            State.PREPARING
            | State.PRECOPY
            | State.CUT_OVER
            | State.RESTORED
            | State.RECLAIMED
            | State.ABORTED
            | State.DISCARDED
        ):
            return Side.SOURCE
    assert_never(state)


def may_abort(side: Side, state: State, *, tasks_alive: bool = True) -> bool:
    """Whether this side may end the migration by itself.

    `tasks_alive` is False when the tasks of its copy are gone (the host was down). A target in RESTORED may not
    abort: it asks the source, or waits; with its tasks gone it has nothing to wait for. A source in CUT_OVER or
    RESTORED may; with its tasks gone it may not, for the copy of a target in RESTORED is then the only one, and
    whether it runs (FORCED) is for a person to say.
    """
    if side is _TARGET and state is State.RESTORED:
        return not tasks_alive
    if side is _SOURCE and state in {State.CUT_OVER, State.RESTORED} and not tasks_alive:
        return False
    return (side, state, Event.ABORT) in TRANSITIONS
