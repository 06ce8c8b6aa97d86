"""The steps of a freeze and of a restore: their times, their limit, and why they stand in this order."""

from __future__ import annotations

import enum
import time

from protocol.errors import NotConvergedError


class Stage(enum.Enum):
    """A target's task on its way, with the reason for the barrier behind each stage."""

    INTERCEPTED = "intercepted"  # the runtime has built the container; its program has not run an instruction
    STRIPPED = "stripped"  # nothing but our scratch and the vDSO is mapped: the source's areas fit anywhere
    FILLING = "filling"  # areas are writable, pages arrive while the source runs
    THREADED = "threaded"  # all threads exist: what belongs to a thread has a place
    FINAL = "final"  # the source is frozen: protections, then the state of process and threads
    FILES = "files"  # after the credentials of the files' makers no longer matter, before signals could run anything
    COMPLETE = "complete"  # registers are set, the cgroup is frozen, nobody traces it


class Clock:
    """Times the parts of a freeze, in the order they happen."""

    def __init__(self) -> None:
        self.started_ns = time.monotonic_ns()
        self.parts: dict[str, float] = {}
        self._last_ns = self.started_ns

    def part(self, name: str) -> None:
        """Everything since the last part was this one."""
        now_ns = time.monotonic_ns()
        self.parts[name] = self.parts.get(name, 0.0) + (now_ns - self._last_ns) / 1e6
        self._last_ns = now_ns


class Deadline:
    """The budget of a freeze."""

    def __init__(self, budget_s: float) -> None:
        self._budget_s = budget_s
        self._end_s = time.monotonic() + budget_s

    def check(self) -> None:
        """Raises: NotConvergedError: it is used up."""
        if time.monotonic() > self._end_s:
            raise NotConvergedError(
                f"the freeze took longer than its budget of {self._budget_s:g} s",
                code="freeze-budget", hint="a larger --freeze-budget, or a time with less load",
            )  # fmt: skip
