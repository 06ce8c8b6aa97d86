"""Looks at the test hosts from outside while something moves: journals, processes, and whatever could be left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.states import FINAL
from tests.lab.containers import Container, ContainerHost
from tests.lab.host import BIN
from tests.lab.lab import wait_until
from tests.lab.scenario import Scenario

_STATE_DIR = "var/lib/migrate"
_FINAL = {state.value for state in FINAL}
_PROGRAMS = {"engine": "agent.engine.native.main", "stream": "agent.transfer.main"}


@dataclass(frozen=True, slots=True)
class Row:
    """One side of one migration, as its journal has it."""

    migration: str
    side: str
    state: str
    container: str
    detail: str
    pending_undo: int

    @property
    def is_over(self) -> bool:
        """Nothing is left to do or to undo."""
        return self.state in _FINAL and not self.pending_undo


def journal(host: ContainerHost) -> list[Row]:
    """All rows, the newest first, read from the host's disk; [] before there is a journal."""
    path = host.persist / _STATE_DIR / "journal.sqlite"
    if not path.exists():
        return []
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'migrations'").fetchone():
            return []  # the agent is just making it
        rows = db.execute(
            "SELECT migration, side, state, container, detail, (SELECT count(*) FROM undo"
            " WHERE undo.migration = migrations.migration AND undo.side = migrations.side)"
            " FROM migrations ORDER BY started DESC"
        )
        return [Row(*row) for row in rows]


def latest(host: ContainerHost, container: str) -> Row | None:
    """The newest row of a container."""
    return next((row for row in journal(host) if row.container == container), None)


def processes(host: ContainerHost) -> dict[int, str]:
    """What runs on the host, containers too: pid as we see it -> command line. Dead ones are not listed."""
    found = {}
    for pid in host.cgroups.pids():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if command:
                found[pid] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def worker(host: ContainerHost, kind: str, side: str) -> int:
    """The pid, as we see it, of the one engine or stream of that side. Raises: AssertionError: not exactly one."""
    found = [
        pid for pid, command in processes(host).items() if _PROGRAMS[kind] in command and f"--side {side}" in command
    ]
    # It forks helpers, which look the same for as long as they live.
    wanted = [pid for pid in found if _parent(pid) not in found]
    assert len(wanted) == 1, f"{host.name} has {len(wanted)} {side} {kind}s"
    return wanted[0]


def kill(host: ContainerHost, what: str) -> None:
    """SIGKILL the 'agent', or the 'source engine', 'target stream' and so on."""
    if what == "agent":
        host.kill_agent()
        return
    side, kind = what.split()
    os.kill(worker(host, kind, side), signal.SIGKILL)


def _parent(pid: int) -> int:
    """Source: proc_pid_stat(5), field 4. 0: it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat[stat.rindex(")") + 2 :].split()[1])


def is_frozen(pid: int) -> bool:
    """Whether the control group of a container is frozen. Source: cgroups(7)."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if "freezer" in controllers.split(","):
            return Path(f"/sys/fs/cgroup/freezer{group}/freezer.state").read_text().strip() == "FROZEN"
    (group,) = [line.split(":", 2)[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    return "frozen 1" in Path(f"/sys/fs/cgroup{group}/cgroup.events").read_text().splitlines()


def is_traced(pid: int) -> bool:
    """Whether somebody traces the process. Source: proc(5), TracerPid."""
    status = Path(f"/proc/{pid}/status").read_text()
    return re.search(r"^TracerPid:\t0$", status, re.MULTILINE) is None


def waits_for_a_frame(pid: int) -> bool:
    """Whether an engine has done all that it was told. Source: proc(5), /proc/PID/syscall: poll(2)."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] == "7"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of a host that a migration touches; equal when nothing was left behind and nothing is missing."""

    containers: dict[str, str]
    workers: list[str]
    links: dict[str, str]  # name -> the bridge it is on
    namespaces: list[str]
    cgroups: dict[str, str]  # of the freezer hierarchy: place -> state
    configs: dict[str, str]
    others: list[str]  # in the bundles


def snapshot(host: ContainerHost) -> Snapshot:
    """See Snapshot."""
    links = json.loads(host.run(["ip", "-json", "link"]).stdout)
    bundles = host.persist / "var/lib/containers-lab"
    listed = host.run(["ip", "netns", "list"]).stdout
    return Snapshot(
        containers=host.runc_list(),
        workers=sorted(c for c in processes(host).values() if any(p in c for p in (*_PROGRAMS.values(), "runc"))),
        links={link["ifname"]: link.get("master", "") for link in links},
        namespaces=sorted(line.split()[0] for line in listed.splitlines()),
        cgroups=_cgroups(host),
        configs={path.parent.name: path.read_text() for path in sorted(bundles.glob("*/config.json"))},
        others=sorted(path.name for path in bundles.glob("*/config.json?*")),
    )


def _cgroups(host: ContainerHost) -> dict[str, str]:
    found = {}
    for top in host.cgroups.directories:
        for directory, _, _ in os.walk(top):
            place = Path(directory)
            for name in ("freezer.state", "cgroup.freeze"):
                with contextlib.suppress(FileNotFoundError):
                    found[f"{place.relative_to(top)}/{name}"] = (place / name).read_text().strip()
    return found


class Moving:
    """`migrate --json container ...` while it runs."""

    def __init__(self, scenario: Scenario, container: str, source: ContainerHost, *options: str) -> None:
        self.source = source
        self.target = scenario.b if source is scenario.a else scenario.a
        self.container = container
        before = {row.migration for row in journal(source)}
        command: list[str | Path] = [
            BIN / "migrate",
            "--json",
            "container",
            container,
            "--to",
            self.target.name,
            *options,
        ]
        self.process = scenario.client.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._before = before

    def row(self, host: ContainerHost) -> Row | None:
        """This migration's row in the journal of a host."""
        return next(
            (r for r in journal(host) if r.container == self.container and r.migration not in self._before), None
        )

    def wait_state(self, host: ContainerHost, state: str) -> Row:
        """Until the host's journal says `state`."""

        def reached() -> Row | None:
            row = self.row(host)
            assert self.process.poll() is None, (
                f"migrate ended with {self.process.returncode}: {self.process.communicate()}"
            )
            assert row is None or not row.is_over, f"it is over: {row}"
            return row if row is not None and row.state == state else None

        found: Row = wait_until(reached, timeout_s=20, what=f"{state} in the journal of {host.name}")
        return found

    def wait_precopy(self) -> Row:
        """Until both sides copy while the container runs."""
        self.wait_state(self.target, "precopy")
        return self.wait_state(self.source, "precopy")

    def wait_freeze(self, container: Container) -> Row:
        """Until the container is frozen, and stays so while its memory is sent."""
        row = self.wait_state(self.source, "cut-over")
        wait_until(lambda: is_frozen(container.pid), what="the freeze")
        return row

    def wait_over(self, host: ContainerHost) -> Row:
        """Until the host's journal has nothing left to do."""
        found: Row = wait_until(
            lambda: row if (row := self.row(host)) is not None and row.is_over else None,
            timeout_s=40, what=f"the end of the migration on {host.name}",
        )  # fmt: skip
        return found

    def end(self, timeout_s: float = 60) -> tuple[int, dict[str, Any]]:
        """Exit status and result of `migrate`."""
        out, err = self.process.communicate(timeout=timeout_s)
        assert re.match(r"\{", out), f"no result, status {self.process.returncode}: {err}"
        result: dict[str, Any] = json.loads(out)
        return self.process.returncode, result
