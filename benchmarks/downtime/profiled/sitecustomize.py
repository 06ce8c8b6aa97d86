"""On the import path of an agent: its engines profile what they do in the freeze, and write that at their end.

Only the profiler's calls of Python functions are counted; a system call's time is its wrapper's own.
"""

from __future__ import annotations

import atexit
import cProfile
import os
import pstats
import sys
from pathlib import Path
from typing import Any

_IN_FREEZE = {"FINAL", "FILES", "COMPLETE"}  # names of agent.engine.native.stages.Stage


def _write(side: str, profiles: list[cProfile.Profile]) -> None:
    if not profiles:
        return
    stats = pstats.Stats(profiles[0])
    for profile in profiles[1:]:
        stats.add(profile)
    directory = Path(os.environ["MIGRATE_PROFILE_DIR"])
    directory.mkdir(exist_ok=True)
    stats.dump_stats(directory / f"{side}-{os.getpid()}.pstats")


def _profile_source() -> None:
    from agent.engine.native import source_engine

    profiles: list[cProfile.Profile] = []
    original = source_engine._Freeze.run

    def run(freeze: Any) -> Any:
        profiles.append(cProfile.Profile(builtins=False))
        return profiles[0].runcall(original, freeze)

    source_engine._Freeze.run = run  # type: ignore[assignment]
    atexit.register(_write, "source", profiles)


def _profile_target() -> None:
    from agent.engine.native.target_engine import TargetEngine

    profiles: list[cProfile.Profile] = []
    original = TargetEngine.apply

    def apply(engine: Any, payload: bytes) -> Any:
        profile = cProfile.Profile(builtins=False)
        done = profile.runcall(original, engine, payload)
        if engine.stage.name in _IN_FREEZE:
            profiles.append(profile)
        return done

    TargetEngine.apply = apply  # type: ignore[assignment]
    atexit.register(_write, "target", profiles)


# A site module runs before the program's: only the original command line tells which that will be.
if "agent.engine.native.main" in sys.orig_argv:
    if "source" in sys.orig_argv:
        _profile_source()
    else:
        _profile_target()
