from __future__ import annotations

import errno
import os
import signal
import struct
import time

import pytest

from agent.arch import SYS
from agent.engine.native.freeze import freeze_process
from agent.engine.native.remote import RemoteSyscalls, find_hole
from agent.engine.native.tracee import Tracee
from agent.kernel import procfs, ptrace
from agent.kernel.ptrace import Option
from agent.kernel.types import Pid, Tid
from protocol.errors import KernelError, TaskGoneError
from tests.kernel.programs import puppet, running


def test_a_process_makes_a_call_for_us_and_goes_on() -> None:
    with puppet() as it:
        frozen = freeze_process(it.pid)
        with RemoteSyscalls(frozen.leader) as remote:
            assert remote.call(SYS.getpid) == it.pid
            with pytest.raises(KernelError, match=r"injected close\(99\).*Bad file descriptor") as caught:
                remote.call(SYS.close, 99)
            assert caught.value.errno == errno.EBADF
            assert remote.try_call(SYS.close, 99) == -errno.EBADF
        frozen.thaw()
        assert it.do("answer = 6 * 7") == 42


def test_a_batch_of_2000_calls_takes_milliseconds() -> None:
    with puppet() as it:
        frozen = freeze_process(it.pid)
        with RemoteSyscalls(frozen.leader) as remote:
            remote.map_scratch()
            began = time.perf_counter()
            assert remote.batch([(SYS.getpid,)] * 2000) == [it.pid] * 2000
            assert time.perf_counter() - began < 0.1
            assert remote.batch([(SYS.getpid,)] * 4100) == [it.pid] * 4100
            assert remote.batch([]) == []
        frozen.thaw()
        assert it.do("answer = 1") == 1
        assert not [a for a in procfs.read_maps(it.pid) if a.start == 0x100000]


def test_a_failed_call_of_a_batch_is_named_or_passed_over() -> None:
    with puppet() as it:
        frozen = freeze_process(it.pid)
        with RemoteSyscalls(frozen.leader) as remote:
            remote.map_scratch()
            calls = [(SYS.getpid,), (SYS.close, 77), (SYS.getpid,)]
            assert remote.batch(calls, keep_going=True) == [it.pid, -errno.EBADF, it.pid]
            with pytest.raises(KernelError, match=r"close\(77\), thread \d+, call 1 of a batch"):
                remote.batch(calls)
        frozen.thaw()


def test_scratch_is_never_writable_and_executable_and_lies_clear_of_both_spaces() -> None:
    with puppet() as it:
        frozen = freeze_process(it.pid)
        with RemoteSyscalls(frozen.leader) as remote:
            other = procfs.MemoryArea(0x100000, 0x230000, "rw-p", 0, 0, 0, "")
            remote.map_scratch([[other]])
            scratch = remote.scratch
            assert scratch is not None
            assert scratch.start >= other.end
            mine = [a for a in procfs.read_maps(it.pid) if scratch.start <= a.start < scratch.end]
            assert [a.perms for a in mine] == ["r-xp", "rw-p"]
            address = remote.place(b"path\0")
            assert remote.read(address, 5) == b"path\0"
            with pytest.raises(MemoryError):
                remote.place(bytes(scratch.size_bytes))
            remote.reset()
            assert remote.place(b"x") == address
        frozen.thaw()


def test_a_hole_is_found_between_areas() -> None:
    areas = [
        procfs.MemoryArea(start, end, "rw-p", 0, 0, 0, "")
        for start, end in ((0x100000, 0x180000), (0x300000, 0x310000))
    ]
    assert find_hole(0x40000, [areas]) == 0x180000
    assert find_hole(0x180000, [areas[:1], areas[1:]]) == 0x180000
    assert find_hole(0x180001, [areas]) == 0x310000


def test_an_ignored_sigtrap_stays_ignored() -> None:
    with puppet() as it:
        it.do("signal.signal(signal.SIGTRAP, signal.SIG_IGN)")
        frozen = freeze_process(it.pid)
        with RemoteSyscalls(frozen.leader) as remote:
            remote.map_scratch()
            remote.batch([(SYS.getpid,)])
        frozen.thaw()
        assert procfs.read_status(it.pid).sig_ignored >> (signal.SIGTRAP - 1) & 1


def test_two_threads_run_batches_at_once_in_one_scratch() -> None:
    with puppet() as it:
        it.do("import threading; threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()")
        frozen = freeze_process(it.pid)
        leader, second = frozen.threads
        with RemoteSyscalls(leader) as remote:
            remote.map_scratch()
            other = remote.share_scratch(second)
            for one in (remote, other):
                one.start_batch([(SYS.gettid,)] * 30)
            assert remote.finish_batch() == [leader.tid] * 30
            assert other.finish_batch() == [second.tid] * 30
            address = other.place(b"altstack room")
            assert remote.read(address, 4) == b"alts"
            second.restore()
        frozen.thaw()
        assert it.do("answer = threading.active_count()") == 2


def test_children_made_by_a_batch_are_told() -> None:
    with running("sleep", "1000") as process:
        tracee = Tracee(Tid(process.pid), Pid(process.pid))
        tracee.seize(Option.TRACESYSGOOD | Option.TRACECLONE | Option.TRACEFORK | Option.EXITKILL)
        tracee.interrupt()
        tracee.wait_stop()
        with RemoteSyscalls(tracee) as remote:
            remote.map_scratch()
            results = remote.batch([(SYS.clone, signal.SIGCHLD, 0, 0, 0, 0)] * 3)
            assert remote.new_tids == results
            assert len(set(results)) == 3
            for number in results:
                child = Tracee(Tid(number), Pid(number))
                child.wait_stop()
                os.kill(number, signal.SIGKILL)
                assert ptrace.wait(child.tid).is_gone
                assert remote.call(SYS.wait4, number, 0, 0, 0) == number
        tracee.detach()


def test_an_exec_made_for_us_leaves_the_new_program_ready() -> None:
    with running("sleep", "1000") as process:
        frozen = freeze_process(process.pid, options=Option.TRACESYSGOOD | Option.TRACEEXEC)
        remote = RemoteSyscalls(frozen.leader)
        remote.map_scratch()
        path = remote.place(b"/bin/sleep\0")
        argument = remote.place(b"500\0")
        vector = remote.place(struct.pack("=3Q", path, argument, 0))
        assert remote.call(SYS.execve, path, vector, 0) == 0
        assert remote.call(SYS.getpid) == process.pid
        frozen.thaw()
        assert procfs.read_proc(f"/proc/{process.pid}/cmdline") == b"/bin/sleep\x00500\x00"


def test_a_sigstop_that_comes_while_registers_are_borrowed_takes_effect_afterwards() -> None:
    with running("sleep", "1000") as process:
        frozen = freeze_process(process.pid)
        with RemoteSyscalls(frozen.leader) as remote:
            os.kill(process.pid, signal.SIGSTOP)
            assert remote.call(SYS.getpid) == process.pid
            remote.map_scratch()
            assert remote.batch([(SYS.getpid,)]) == [process.pid]
        frozen.thaw()
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)


def test_a_process_killed_under_us_is_gone() -> None:
    with running("sleep", "1000") as process:
        frozen = freeze_process(process.pid)
        remote = RemoteSyscalls(frozen.leader)
        process.kill()
        with pytest.raises(TaskGoneError):
            remote.call(SYS.getpid)
        assert not frozen.still_frozen()
        frozen.thaw()
