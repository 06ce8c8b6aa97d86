"""Where the time in the freeze goes, by function, on both sides: cProfile within the engines. It makes them slower."""

from __future__ import annotations

import pstats
from pathlib import Path

from benchmarks.downtime.measure import BenchmarkError, Say, follow
from tests.lab.lab import wait_until
from tests.lab.load import RedisLoad
from tests.lab.scenario import REDIS_PORT, two_hosts

_IP = "10.77.0.50"
_PLACE = Path("/tmp/profile")
_SITE = Path(__file__).with_name("profiled")

Row = tuple[str, int, float, float]  # function, calls, its own ms, ms with what it calls; a migration


def take(*, migrations: int = 4, size_mb: int = 256, say: Say) -> dict[str, list[Row]]:
    """Rows by side, those with the most own time first, averaged over `migrations`.

    Raises: BenchmarkError: a migration failed.
    """
    say(f"profile of the engines in the freeze: {migrations} migrations of {size_mb} MB")
    environment = {"PYTHONPATH": str(_SITE), "MIGRATE_PROFILE_DIR": str(_PLACE)}
    with two_hosts(agent_env=environment) as scenario:
        scenario.add_redis("web1", _IP)
        with RedisLoad(scenario.client, f"{_IP}:{REDIS_PORT}", prefill_mb=size_mb):
            for number in range(migrations):
                target = scenario.a if number % 2 else scenario.b
                seen = follow(scenario, "container", "web1", "--to", target.name)
                if seen.result["status"] != "completed":
                    raise BenchmarkError(f"a profiled migration failed: {seen.result.get('error')}")
        files = [host.root / str(_PLACE).lstrip("/") for host in (scenario.a, scenario.b)]
        return {side: _rows(_wait_written(files, side, migrations), migrations) for side in ("source", "target")}


def _wait_written(directories: list[Path], side: str, wanted: int) -> list[Path]:
    """An engine writes when it ends, a little after `migrate` does."""

    def written() -> list[Path]:
        found = [path for directory in directories for path in directory.glob(f"{side}-*.pstats")]
        return found if len(found) >= wanted else []

    files: list[Path] = wait_until(written, what=f"{wanted} profiles of {side}")
    return files


def _rows(files: list[Path], migrations: int) -> list[Row]:
    stats = pstats.Stats(*map(str, files))
    rows = []
    entries: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = stats.stats  # type: ignore[attr-defined]
    for (path, _, function), (_, calls, own_s, all_s, _) in entries.items():
        own_ms, all_ms = own_s / migrations * 1e3, all_s / migrations * 1e3
        rows.append((f"{_short(path)}: {function}", round(calls / migrations), own_ms, all_ms))
    return sorted(rows, key=lambda row: -row[2])


def _short(path: str) -> str:
    """'agent/kernel/ptrace.py' of a path anywhere."""
    for root in ("agent", "protocol"):
        if f"/{root}/" in path:
            return f"{root}/{path.rpartition(f'/{root}/')[2]}"
    return Path(path).name
