"""Copy memory in rounds while the container runs, until it is worth to cut over."""

from __future__ import annotations

import msgspec
import trio

from migrate.convergence import Budget, Decision, dirty_rate, fixed_cost_ms, judge
from migrate.events import RoundEnded
from migrate.phases.prepare import Prepared
from migrate.phases.session import Session
from protocol import messages as m
from protocol.errors import NotConvergedError


async def enter(session: Session, prepared: Prepared, deadline: float) -> list[m.RoundReport]:
    """Run rounds until the policy says to cut over. `deadline` is on trio's clock.

    Raises: NotConvergedError: the policy gave up; what the agent answers.
    """
    request = session.request
    rounds: list[m.RoundReport] = []
    while True:
        # Rounds count from 0 on the wire and from 1 for people.
        done = await session.source.request(m.RunRound(migration=session.migration, round=len(rounds)), m.RoundDone)
        report = msgspec.structs.replace(done.report, round=len(rounds) + 1)
        rounds.append(report)
        budget = Budget(
            max_downtime_ms=request.max_downtime_s * 1000.0,
            max_rounds=request.max_rounds,
            remaining_ms=(deadline - trio.current_time()) * 1000.0,
            fixed_ms=fixed_cost_ms(prepared.container),
        )
        verdict = judge(rounds, budget)
        session.tell(RoundEnded(report=report, verdict=verdict, dirty_rate=dirty_rate(report)))
        match verdict.decision:
            case Decision.CUT_OVER:
                return rounds
            case Decision.GIVE_UP:
                raise NotConvergedError(
                    f"{request.container} changes its memory faster than it can be copied: {verdict.reason}; expected "
                    f"downtime {verdict.expected_downtime_ms:.0f} ms, allowed {budget.max_downtime_ms:.0f} ms",
                    host=session.source.name,
                    hint="a larger --max-downtime, more --bandwidth, a quieter time, or --strategy stop-copy",
                )
            case Decision.COPY_AGAIN:
                continue
