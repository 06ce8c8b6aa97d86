from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.arch import SYS
from agent.engine.native.freeze import freeze_process, freeze_processes
from agent.engine.native.remote import RemoteSyscalls
from agent.engine.tracking.pagemap_scan import PagemapScanTracker
from agent.kernel import procfs
from protocol.errors import KernelError, TaskGoneError, UnsupportedError
from tests.kernel.programs import compile_c, puppet, running

THREADS = 50


@dataclass
class Threads:
    pid: int
    table: Path

    def rounds(self) -> list[int]:
        return [row[0] for row in self._rows()]

    def errors(self) -> list[tuple[int, str]]:
        """(thread, errno) of those that a system call failed for."""
        return [(i, errno.errorcode[row[2]]) for i, row in enumerate(self._rows()) if row[1]]

    def wait_until_all_went_on(self, since: list[int]) -> None:
        deadline = time.monotonic() + 10
        while any(now < before + 2 for now, before in zip(self.rounds(), since, strict=True)):
            assert time.monotonic() < deadline, f"some thread stands still: {since} -> {self.rounds()}"
            os.sched_yield()

    def _rows(self) -> list[tuple[int, ...]]:
        data = self.table.read_bytes()
        return [struct.unpack_from("=3Q", data, 24 * i) for i in range(THREADS)]


@pytest.fixture
def threads(tmp_path: Path) -> Iterator[Threads]:
    program = compile_c((Path(__file__).parent / "many_threads.c").read_text(), tmp_path / "many_threads")
    table = tmp_path / "table"
    table.write_bytes(bytes(4096))
    with running(program, table) as process:
        it = Threads(process.pid, table)
        it.wait_until_all_went_on([0] * THREADS)
        yield it


def test_50_threads_stand_still_and_go_on_without_an_error(threads: Threads) -> None:
    for _ in range(20):
        before = threads.rounds()
        frozen = freeze_process(threads.pid)
        standing = threads.rounds()
        assert len(frozen.tracees) == THREADS
        assert frozen.still_frozen()
        assert threads.rounds() == standing
        frozen.thaw()
        assert not frozen.still_frozen()
        threads.wait_until_all_went_on(before)
    assert threads.errors() == []


def test_50_threads_are_asked_to_stop_within_milliseconds(threads: Threads) -> None:
    taken = []
    for _ in range(10):
        began = time.perf_counter()
        frozen = freeze_process(threads.pid)
        taken.append(time.perf_counter() - began)
        frozen.thaw()
    assert min(taken) < 0.010


def test_injected_calls_in_every_thread_leave_no_error_behind(threads: Threads) -> None:
    for _ in range(5):
        before = threads.rounds()
        frozen = freeze_process(threads.pid)
        with RemoteSyscalls(frozen.leader) as remote:
            remote.map_scratch()
            others = [remote.share_scratch(t, rows=4, data_bytes=64) for t in frozen.threads[1:]]
            for one in (remote, *others):
                one.start_batch([(SYS.gettid,)] * 4)
            assert [one.finish_batch()[0] for one in (remote, *others)] == [t.tid for t in frozen.threads]
        frozen.thaw()
        threads.wait_until_all_went_on(before)
    assert threads.errors() == []


def test_arming_the_tracker_leaves_no_error_behind(threads: Threads) -> None:
    for _ in range(10):
        tracker = PagemapScanTracker()
        before = threads.rounds()
        tracker.arm(threads.pid)
        tracker.scan_round(procfs.read_maps(threads.pid))
        threads.wait_until_all_went_on(before)
        tracker.close()
    assert threads.errors() == []


def test_a_sleep_ends_when_it_would_have_ended() -> None:
    with puppet() as it:
        assert it.process.stdin is not None
        assert it.process.stdout is not None
        it.process.stdin.write("t = time.monotonic(); time.sleep(0.5); answer = time.monotonic() - t\n")
        it.process.stdin.flush()
        while procfs.read_stat(it.pid).state != "S":
            os.sched_yield()
        for _ in range(5):
            frozen = freeze_process(it.pid)
            with RemoteSyscalls(frozen.leader) as remote:
                remote.call(SYS.getpid)
            frozen.thaw()
        assert 0.5 <= float(it.process.stdout.readline()) < 0.6


def test_a_pause_still_ends_by_a_signal_that_came_in_the_freeze() -> None:
    with puppet() as it:
        it.do("signal.signal(signal.SIGUSR1, lambda *a: None)")
        assert it.process.stdin is not None
        assert it.process.stdout is not None
        it.process.stdin.write("answer = libc.pause(); answer = (answer, ctypes.get_errno())\n")
        it.process.stdin.flush()
        while procfs.read_proc(f"/proc/{it.pid}/syscall").split()[0] != b"34":
            os.sched_yield()
        frozen = freeze_process(it.pid)
        with RemoteSyscalls(frozen.leader) as remote:
            remote.call(SYS.getpid)
            os.kill(it.pid, signal.SIGUSR1)
            remote.call(SYS.getpid)
        frozen.thaw()
        assert it.process.stdout.readline() == f"(-1, {errno.EINTR})\n"


def test_a_stopped_process_stays_stopped() -> None:
    with running("sleep", "1000") as process:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        frozen = freeze_process(process.pid)
        assert frozen.leader.stop_signal == signal.SIGSTOP
        with RemoteSyscalls(frozen.leader) as remote:
            assert remote.call(SYS.getpid) == process.pid
        frozen.thaw()
        # Let go, it runs as far as to its own stop again.
        while (state := procfs.read_stat(process.pid).state) == "R":
            os.sched_yield()
        assert state == "T"
        os.kill(process.pid, signal.SIGCONT)
        os.waitpid(process.pid, os.WCONTINUED)


def test_a_traced_process_is_refused_by_the_tracer_s_name() -> None:
    with running("sleep", "1000") as process:
        source = (
            "import sys; from agent.engine.native.freeze import freeze_process\n"
            f"f = freeze_process({process.pid}); print(1, flush=True); sys.stdin.read(); f.thaw()"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", source], **pipes) as tracer:  # type: ignore[call-overload]
            tracer.stdout.readline()
            with pytest.raises(UnsupportedError, match=rf"traced by process {tracer.pid} \(python"):
                freeze_process(process.pid)
        freeze_process(process.pid).thaw()


def test_a_dead_process_is_told() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(TaskGoneError):
        freeze_process(child.pid)


VFORK = """
#include <unistd.h>
#include <stdlib.h>
int main(int argc, char **argv) {
	if (vfork() == 0) { usleep(atoi(argv[1]) * 1000); _exit(0); }
	pause();
	return argc;
}
"""


def test_a_vfork_parent_times_out_and_everybody_else_goes_on(tmp_path: Path) -> None:
    program = compile_c(VFORK, tmp_path / "vfork")
    with puppet() as other, running(program, "700") as process:
        while procfs.read_stat(process.pid).state != "D" or not procfs.children(process.pid):
            os.sched_yield()
        with pytest.raises(KernelError, match="waits for its vfork child") as caught:
            freeze_processes([other.pid, process.pid], timeout_s=0.1)
        assert caught.value.errno == errno.ETIMEDOUT
        assert other.do("answer = 1") == 1
        assert procfs.read_tracer(process.pid) is None
        freeze_process(process.pid, timeout_s=5).thaw()


def test_a_thread_made_behind_our_back_breaks_the_stop() -> None:
    with puppet() as it:
        frozen = freeze_process(it.pid)
        assert frozen.still_frozen()
        lost = frozen.tracees.popitem()
        assert not frozen.still_frozen()
        frozen.tracees[lost[0]] = lost[1]
        frozen.thaw()
        frozen.thaw()
        assert it.do("answer = 1") == 1


def test_the_process_lives_on_when_its_tracer_dies() -> None:
    with puppet() as it:
        source = (
            "import os; from agent.engine.native.freeze import freeze_process\n"
            "from agent.engine.native.remote import RemoteSyscalls; from agent.arch import SYS\n"
            f"f = freeze_process({it.pid})\n"
            "with RemoteSyscalls(f.leader) as r: r.call(SYS.getpid)\n"
            "os.kill(os.getpid(), 9)"
        )
        assert subprocess.run([sys.executable, "-c", source]).returncode == -signal.SIGKILL
        assert it.do("answer = 1") == 1
