"""Against the real runtime: runc, a minimal root filesystem, no rlimits raised."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.arch import SYS
from agent.engine.native.intercept import intercept_exec
from agent.engine.native.remote import RemoteSyscalls
from agent.kernel import procfs, ptrace
from agent.kernel.ptrace import Option
from protocol.errors import MigrateError, TaskGoneError

PROGRAMS = ("/bin/sh", "/bin/sleep")


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rootfs")
    for directory in ("proc", "dev", "sys", "tmp", "bin"):
        (root / directory).mkdir()
    for program in PROGRAMS:
        shutil.copy(program, root / program[1:])
        libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        for word in libraries.split():
            if word.startswith("/"):
                target = root / word[1:]
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(word, target)
    return root


Create = Callable[[list[str]], tuple[int, list[str]]]


@pytest.fixture
def create(rootfs: Path, tmp_path: Path) -> Iterator[Create]:
    """`create(argv)` gives the pid of init and the command that starts it."""
    runtime = ["runc", "--root", str(tmp_path / "state")]
    name = f"intercept-{os.getpid()}"

    def make(argv: list[str]) -> tuple[int, list[str]]:
        bundle = tmp_path / "bundle"
        bundle.mkdir()
        subprocess.run(["runc", "spec"], cwd=bundle, check=True)
        config = json.loads((bundle / "config.json").read_text())
        config["process"]["args"] = argv
        config["process"]["terminal"] = False
        del config["process"]["rlimits"]
        config["root"] = {"path": str(rootfs), "readonly": True}
        (bundle / "config.json").write_text(json.dumps(config))
        with (tmp_path / "log").open("wb") as log:
            subprocess.run(
                [*runtime, "create", "--bundle", str(bundle), name],
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        state = json.loads(subprocess.run([*runtime, "state", name], check=True, capture_output=True).stdout)
        return int(state["pid"]), [*runtime, "start", name]

    yield make
    subprocess.run([*runtime, "delete", "--force", name], check=True, capture_output=True)


def is_dead(pid: int) -> bool:
    """Its own parent may still have to reap it."""
    try:
        return procfs.read_status(pid).state in {"Z", "X"}
    except TaskGoneError:
        return True


def test_init_stands_before_its_first_instruction_and_obeys(create: Create) -> None:
    pid, start = create(["/bin/sleep", "1000"])
    intercepted = intercept_exec(pid, start)
    tracee = intercepted.tracee
    assert (tracee.pid, procfs.read_comm(pid)) == (pid, b"sleep")
    assert procfs.read_namespace_pids(pid)[-1] == 1
    assert intercepted.wait_starter(5) == 0
    with RemoteSyscalls(tracee) as remote:
        assert remote.call(SYS.getpid) == 1
        remote.map_scratch()
        assert remote.batch([(SYS.getpid,)] * 100) == [1] * 100
    ptrace.set_options(tracee.tid, Option.TRACESYSGOOD)
    tracee.detach()
    while procfs.read_proc(f"/proc/{pid}/syscall").split()[0] != str(SYS.clock_nanosleep).encode():
        os.sched_yield()
    intercepted.output.close()
    state = json.loads(subprocess.run([*start[:-2], "state", start[-1]], check=True, capture_output=True).stdout)
    assert (state["status"], state["pid"]) == ("running", pid)


def test_a_failing_start_is_told_and_init_is_gone(create: Create) -> None:
    pid, start = create(["/bin/sleep", "1000"])
    with pytest.raises(MigrateError, match=r"no-such-container.*status 1.*does not exist"):
        intercept_exec(pid, [*start[:-1], "no-such-container"])
    assert is_dead(pid)


def test_a_start_that_does_not_come_is_given_up(create: Create) -> None:
    pid, _ = create(["/bin/sleep", "1000"])
    with pytest.raises(MigrateError, match="not reached in time"):
        intercept_exec(pid, ["sleep", "60"], timeout_s=0.3)
    assert is_dead(pid)


def test_init_killed_meanwhile_is_told(create: Create) -> None:
    pid, _ = create(["/bin/sleep", "1000"])
    with pytest.raises(TaskGoneError, match="ended before its exec"):
        intercept_exec(pid, ["sh", "-c", f"kill -9 {pid}; sleep 60"])


def test_init_dies_with_its_tracer(create: Create) -> None:
    pid, start = create(["/bin/sleep", "1000"])
    child = os.fork()
    if child == 0:
        intercept_exec(pid, start)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    while not is_dead(pid):
        os.sched_yield()
