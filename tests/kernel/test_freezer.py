from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.kernel import procfs
from agent.kernel.freezer import Freezer, OpenFreezer, Version, versions
from protocol.errors import TaskGoneError, UnsupportedError
from tests.kernel.programs import Puppet, puppet


def mount_of(version: Version) -> Path:
    kind, controller = ("cgroup", "freezer") if version is Version.V1 else ("cgroup2", "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.split()[0] == kind and controller in right.split()[2]:
            return Path(left.split()[4])
    raise AssertionError(f"no freezer of {version!r} is mounted")


@pytest.fixture(params=versions())
def group(request: pytest.FixtureRequest) -> Iterator[Path]:
    path = mount_of(request.param) / f"migrate-test-{os.getpid()}"
    path.mkdir()
    try:
        yield path
    finally:
        deadline = time.monotonic() + 5
        while (path / "cgroup.procs").read_text() and time.monotonic() < deadline:
            os.sched_yield()
        path.rmdir()


def put(it: Puppet, group: Path) -> Freezer:
    (group / "cgroup.procs").write_text(str(it.pid))
    return Freezer.of(it.pid)


def ticks(it: Puppet) -> int:
    """CPU time, once it has come to rest: a task that its dead tracer let go walks from one stop to the other."""
    while procfs.read_stat(it.pid).state == "R":
        os.sched_yield()
    return int(procfs.read_proc(f"/proc/{it.pid}/schedstat").split()[0])


def test_a_frozen_group_stands_still_and_goes_on(group: Path) -> None:
    with puppet() as it:
        freezer = put(it, group)
        assert freezer.path == group
        assert freezer.tasks() == [it.pid]
        assert not freezer.is_frozen()
        freezer.freeze()
        freezer.wait_frozen(2.0)
        assert freezer.is_frozen()
        before = ticks(it)
        assert it.process.stdin is not None
        it.process.stdin.write("answer = 42\n")
        it.process.stdin.flush()
        os.sched_yield()
        assert ticks(it) == before
        freezer.thaw()
        assert it.process.stdout is not None
        assert it.process.stdout.readline() == "42\n"
        assert not freezer.is_frozen()


def test_a_freeze_of_stopped_tasks_outlives_the_tracer(group: Path) -> None:
    with puppet() as it:
        freezer = put(it, group)
        source = (
            "import os; from agent.engine.native.freeze import freeze_process\n"
            "from agent.engine.native.remote import RemoteSyscalls; from agent.arch import SYS\n"
            "from agent.kernel.freezer import Freezer\n"
            f"f = freeze_process({it.pid})\n"
            "with RemoteSyscalls(f.leader) as r: r.call(SYS.getpid)\n"
            f"z = Freezer.of({it.pid}); z.freeze(); z.wait_frozen(2.0)\n"
            "os.kill(os.getpid(), 9)"
        )
        assert subprocess.run([sys.executable, "-c", source]).returncode == -signal.SIGKILL
        assert procfs.read_tracer(it.pid) is None
        assert freezer.is_frozen()
        before = ticks(it)
        assert it.process.stdin is not None
        assert it.process.stdout is not None
        it.process.stdin.write("answer = 42\n")
        it.process.stdin.flush()
        os.sched_yield()
        assert ticks(it) == before
        freezer.thaw()
        assert it.process.stdout.readline() == "42\n"


def test_an_open_freezer_does_the_same(group: Path) -> None:
    with puppet() as it:
        freezer = put(it, group)
        opened = OpenFreezer(freezer)
        try:
            opened.freeze()
            opened.wait_frozen(2.0)
            assert freezer.is_frozen()
            opened.thaw()
            assert not freezer.is_frozen()
        finally:
            opened.close()
        opened.close()


def test_a_group_is_found_again_by_its_paths_until_it_is_gone(group: Path) -> None:
    with puppet() as it:
        freezer = put(it, group)
        assert Freezer.at(freezer.paths) == freezer
        assert freezer.processes() == [it.pid]
    with pytest.raises(TaskGoneError):
        Freezer.at([str(group / "no-such-group")])


def test_our_own_group_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no control group of its own"):
        Freezer.of(os.getpid())


def test_a_group_is_found_from_inside_a_cgroup_namespace(group: Path, tmp_path: Path) -> None:
    """There /proc/PID/cgroup is relative to the namespace's root, and so is the mount made in it."""
    inner = group / "inner"
    inner.mkdir()
    with puppet() as it:
        (inner / "cgroup.procs").write_text(str(it.pid))
        is_v2 = (group / "cgroup.freeze").exists()
        kind = "-t cgroup2 none" if is_v2 else "-t cgroup -o freezer none"
        script = (
            f"echo $$ > {group}/cgroup.procs && exec unshare --cgroup --mount sh -c '"
            f'umount -l /sys/fs/cgroup; mount {kind} {tmp_path} && exec {sys.executable} -c "'
            f"from agent.kernel.freezer import Freezer; print(Freezer.of({it.pid}).path)\"'"
        )
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
        assert (done.stdout.strip(), done.stderr) == (f"{tmp_path}/inner", "")
        it.close()
        while (inner / "cgroup.procs").read_text():
            os.sched_yield()
    inner.rmdir()
