"""A process and its threads, moved from one real container to another."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from agent.engine import base
from agent.kernel.freezer import Freezer
from tests.survival.bundle import Container
from tests.survival.migration import EngineError, Migration

pytestmark = [pytest.mark.root, pytest.mark.survival]


def status_of(path: str) -> dict[str, str]:
    lines = (line.split(":\t", 1) for line in Path(path, "status").read_text().splitlines())
    return {line[0]: line[1] for line in lines if len(line) == 2}


def wait_for_more(container: Container, text: str, count: int = 3) -> list[str]:
    """Until `count` more lines with `text` have come."""
    before = len(container.lines())
    deadline = time.monotonic() + 20
    while len([line for line in container.lines()[before:] if text in line]) < count:
        assert time.monotonic() < deadline, container.lines()[-5:]
        time.sleep(0.01)
    return container.lines()


def test_a_counter_goes_on_and_its_clock_does_not_jump(yard):
    source = yard.running(yard.program("counter.py"))
    source.wait_line("count 40")
    target = yard.shell_of(source)
    with Migration(source, target) as migration:
        migration.move()
        wait_for_more(target, "count")
    counts = [int(line.split()[1]) for line in source.lines() + target.lines()]
    assert counts == list(range(20, counts[-1] + 20, 20))
    assert not any("BACKWARDS" in line for line in target.lines())
    assert migration.restored.pids == [1]


def test_fifty_waiting_threads_do_not_notice(yard):
    source = yard.running(yard.program("threads.py"))
    source.wait_line("round 10")
    target = yard.shell_of(source)
    with Migration(source, target) as migration:
        migration.move()
        lines = wait_for_more(target, "round")
    assert lines[-1].endswith("failed []")


def test_registers_signals_timers_heap_and_limits_survive(yard):
    source = yard.running(yard.program("state.c"))
    source.wait_line("round 50")
    target = yard.shell_of(source)
    with Migration(source, target) as migration:
        migration.move()
        wait_for_more(target, "round")
        (yard.shared / "deliver").touch()
        last = target.wait_line("delivered")
    lines = source.lines() + target.lines()
    assert not [line for line in lines if line.startswith("BAD")]
    assert last == "OK delivered 2 on_stack 1"


def test_a_restored_container_moves_again(yard):
    here = yard.running(yard.program("state.c"))
    here.wait_line("round 25")
    for _ in range(2):
        there = yard.shell_of(here)
        with Migration(here, there) as migration:
            migration.move(rounds=1)
            wait_for_more(there, "round", 1)
        here = there
    assert not [line for line in here.lines() if line.startswith("BAD")]
    exe = Path(f"/proc/{here.pid}/cmdline").read_bytes()
    assert exe == b"/shared/state\0"


def test_a_process_that_was_thawed_after_its_dump_is_unharmed(yard):
    source = yard.running(yard.program("state.c"))
    source.wait_line("round 25")
    target = yard.shell_of(source)
    with Migration(source, target) as migration:
        migration.prepare()
        migration.round(0)
        migration.cut_over()
        migration.roll_back()
        lines = wait_for_more(source, "round")
        assert not [line for line in lines if line.startswith("BAD")]
        assert target.state["status"] == "stopped"
    (yard.shared / "deliver").touch()
    assert source.wait_line("delivered") == "OK delivered 2 on_stack 1"


def test_a_process_whose_engine_was_killed_in_the_freeze_runs_on(yard):
    source = yard.running(yard.program("state.c"))
    source.wait_line("round 25")
    target = yard.shell_of(source)
    with Migration(source, target) as migration:
        migration.prepare()
        migration.cut_over()
        migration.engines["source"].process.kill()
        Freezer.of(migration.source_pid).thaw()
        lines = wait_for_more(source, "round")
        assert not [line for line in lines if line.startswith("BAD")]


def test_a_restored_container_survives_the_death_of_its_engine(yard):
    source = yard.running(yard.program("state.c"))
    source.wait_line("round 25")
    target = yard.shell_of(source)
    with Migration(source, target) as migration:
        migration.prepare()
        migration.cut_over()
        migration.engines["target"].process.kill()
        migration.engines["target"].process.wait()
        assert Freezer.of(migration.target_pid).is_frozen()
        migration.commit()
        lines = wait_for_more(target, "round")
    assert not [line for line in lines if line.startswith("BAD")]


def test_the_shell_dies_with_its_engine(yard):
    source = yard.running(yard.program("counter.py"))
    target = yard.shell_of(source)
    with Migration(source, target) as migration:
        migration.prepare()
        migration.round(0)
        migration.engines["target"].process.kill()
        migration.engines["target"].process.wait()
        deadline = time.monotonic() + 5
        while target.state["status"] != "stopped":
            assert time.monotonic() < deadline
        wait_for_more(source, "count", 1)


COMPARED = [
    "Name", "Umask", "Uid", "Gid", "Groups", "NSpid", "NSpgid", "NSsid", "SigQ", "SigPnd", "ShdPnd", "SigBlk",
    "SigIgn", "SigCgt", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Seccomp_filters",
    "THP_enabled", "Threads",
]  # fmt: skip


def test_proc_says_the_same_of_credentials_names_and_addresses(yard):
    source = yard.running(yard.program("user.py"))
    source.wait_line("count 5")
    target = yard.shell_of(source)
    with Migration(source, target) as migration:
        migration.prepare()
        migration.round(0)
        migration.cut_over()
        pids = migration.source_pid, migration.target_pid
        tids = [sorted(int(name) for name in os.listdir(f"/proc/{pid}/task")) for pid in pids]
        for ours, theirs in zip(*tids, strict=True):
            before = status_of(f"/proc/{pids[0]}/task/{ours}")
            after = status_of(f"/proc/{pids[1]}/task/{theirs}")
            for key in COMPARED:
                wanted, got = before.get(key, ""), after.get(key, "")
                if key.startswith("NS"):  # the host's own numbers differ
                    wanted, got = wanted.split()[-1], got.split()[-1]
                if key == "SigQ":
                    wanted, got = wanted.split("/")[1], got.split("/")[1]
                assert got == wanted, key
            assert os.getpriority(os.PRIO_PROCESS, ours) == os.getpriority(os.PRIO_PROCESS, theirs)
        for name in ("cmdline", "environ", "auxv", "personality", "oom_score_adj", "timerslack_ns"):
            contents = [Path(f"/proc/{pid}/{name}").read_bytes() for pid in pids]
            if name != "auxv":
                assert contents[0] == contents[1], name
        assert [os.readlink(f"/proc/{pid}/{name}") for pid in pids for name in ("cwd", "exe")] == [
            "/tmp", os.readlink(f"/proc/{pids[0]}/exe")
        ] * 2  # fmt: skip
        assert Path(f"/proc/{pids[0]}/limits").read_text() == Path(f"/proc/{pids[1]}/limits").read_text()

        areas = [re.sub(r"\d+:\d+ \d+", "", Path(f"/proc/{pid}/maps").read_text()) for pid in pids]
        assert flat(areas[0]) == flat(areas[1])
        migration.commit()
        assert "uid (1000, 1001, 1002) gid (1000, 1001, 1002)" in wait_for_more(target, "count")[-1]


def flat(maps: str) -> list[tuple[str, str, tuple[str, str]]]:
    """(address, protection and name) of every border: neighbours may be merged here and not there."""
    out: list[tuple[str, str, tuple[str, str]]] = []
    for line in maps.splitlines():
        address, rest = line.split(None, 1)
        start, end = address.split("-")
        words = rest.split()
        kind = (words[0], words[-1] if len(words) > 3 else "")
        if out and out[-1][1] == start and out[-1][2] == kind:
            out[-1] = (out[-1][0], end, kind)
        else:
            out.append((start, end, kind))
    return out


def test_the_runtime_still_rules_the_restored_container(yard):
    source = yard.running(yard.program("counter.py"))
    source.wait_line("count 20")
    target = yard.shell_of(source)
    with Migration(source, target) as migration:
        migration.move(rounds=1)
        assert target.state["status"] == "running"
        assert target.runc("exec", target.name, "/bin/echo", "inside").stdout == "inside\n"
        target.runc("pause", target.name)
        target.runc("resume", target.name)
        wait_for_more(target, "count", 1)
        target.runc("kill", target.name, "TERM")
        assert source.state["status"] == "stopped"
        source.runc("delete", source.name)


@pytest.mark.parametrize(
    "what",
    [
        "posix-timers", "shared-memory", "shared-file-mapping", "deleted-file", "aio", "system-v-ipc",
        "tmpfs-contents", "chroot",
    ],
)  # fmt: skip
def test_what_cannot_move_is_refused_by_name(yard, what):
    from agent.engine.native.check import check_container

    caps = ["CAP_SYS_CHROOT"] if what == "chroot" else []

    def edit(spec):
        for names in spec["process"]["capabilities"].values():
            names.extend(caps)

    container = yard.running([*yard.program("refused.py"), what], seccomp=False, edit=edit)
    container.wait_line("ready")
    refusals = check_container(container.pid).refusals
    assert what in {refusal.code for refusal in refusals}
    assert all(refusal.message for refusal in refusals)


def test_a_second_process_is_refused(yard):
    source = yard.running(yard.program("children.py"))
    source.wait_line("ready")
    target = yard.shell_of(source)
    with Migration(source, target) as migration, pytest.raises(EngineError) as caught:
        migration.prepare()
    assert caught.value.failure.code == "process-tree"


def test_a_freeze_over_its_budget_ends_with_the_process_running(yard):
    source = yard.running(yard.program("counter.py"))
    source.wait_line("count 20")
    target = yard.shell_of(source)
    with Migration(source, target) as migration:
        migration.prepare()
        migration.round(0)
        engine = migration.engines["source"]
        engine.port.send(base.SourceCutOver(freeze_budget_s=0.0005, cut=[]))
        with pytest.raises(EngineError) as caught:
            while True:
                engine.hear()
        assert caught.value.failure.code in {"freeze-budget", "kernel"}
        wait_for_more(source, "count", 1)
        assert status_of(f"/proc/{migration.source_pid}")["TracerPid"] == "0"
        os.kill(migration.source_pid, signal.SIGCONT)
