"""pidfd, kcmp, robust list, scheduling, SCM_RIGHTS, openat2, namespaces, time namespaces."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.kernel import openat2, pidfd, process, scm, timens
from agent.kernel.namespaces import in_network_namespace
from agent.kernel.process import Kcmp
from protocol.errors import KernelError, TaskGoneError
from tests.kernel.programs import puppet


def test_a_descriptor_is_taken_out_of_another_process() -> None:
    with puppet() as it:
        it.do("r, w = os.pipe(); os.write(w, b'inside')")
        handle = pidfd.pidfd_open(it.pid)
        mine = pidfd.pidfd_getfd(handle, int(str(it.do("answer = r"))))
        assert os.read(mine, 10) == b"inside"
        assert process.kcmp(os.getpid(), it.pid, Kcmp.FILE, mine, int(str(it.do("answer = r")))) == 0
        assert process.kcmp(os.getpid(), it.pid, Kcmp.FILE, mine, int(str(it.do("answer = w")))) != 0
        assert process.kcmp(os.getpid(), it.pid, Kcmp.VM) != 0
        with pytest.raises(KernelError) as caught:
            pidfd.pidfd_getfd(handle, 999)
        assert caught.value.errno == errno.EBADF
        pidfd.pidfd_send_signal(handle, 9)
        it.process.wait()
        with pytest.raises(TaskGoneError):
            pidfd.pidfd_send_signal(handle, 9)
        os.close(mine)
        os.close(handle)


def test_robust_list_and_scheduling_of_another_thread_are_read() -> None:
    with puppet() as it:
        robust = process.get_robust_list(it.pid)
        assert (robust.address != 0, robust.size_bytes) == (True, 24)
        it.do("os.nice(5)")
        attributes = process.get_scheduling(it.pid)
        assert (attributes.policy, attributes.nice, attributes.priority) == (0, 5, 0)
        process.set_scheduling(it.pid, attributes)
        it.do("os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))")
        assert process.get_scheduling(it.pid).policy == os.SCHED_BATCH
    assert process.prctl(process.Prctl.GET_DUMPABLE) in {0, 1}


def test_descriptors_pass_a_socket_and_too_many_are_refused_without_a_leak() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        scm.send_descriptors(ours, [0, 1, 2], b"abc")
        data, received = scm.receive_descriptors(theirs, data_bytes=10)
        assert (data, len(received)) == (b"abc", 3)
        assert not os.get_inheritable(received[0])
        for number in received:
            os.close(number)
        before = set(os.listdir("/proc/self/fd"))
        scm.send_descriptors(ours, [0, 1, 2, 0, 1, 2])
        with pytest.raises(KernelError):
            scm.receive_descriptors(theirs, limit=2)
        assert set(os.listdir("/proc/self/fd")) == before
        with pytest.raises(ValueError, match="250"):
            scm.send_descriptors(ours, [0] * 251)


def test_no_symbolic_link_leads_out_of_a_root(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("inside")
    (tmp_path / "absolute").symlink_to("/etc/passwd")
    (tmp_path / "above").symlink_to("../../../../etc/passwd")
    (tmp_path / "magic").symlink_to("/proc/self/root/etc/passwd")
    root = os.open(tmp_path, os.O_PATH)
    for name in ("absolute", "above", "/etc/passwd", "/../../etc/passwd"):
        found = openat2.open_in_root(root, name)
        assert os.read(found, 100) == b"inside"
        os.close(found)
    with pytest.raises(KernelError):
        openat2.open_in_root(root, "magic")
    with pytest.raises(KernelError) as caught:
        openat2.open_in_root(root, "absolute", os.O_RDONLY | os.O_NOFOLLOW)
    assert caught.value.errno == errno.ELOOP
    os.close(root)
    with puppet() as it:
        own_root = openat2.open_root_of(it.pid)
        os.close(own_root)


def test_a_thread_visits_another_network_namespace_and_comes_back() -> None:
    home = os.readlink("/proc/thread-self/ns/net")
    with subprocess.Popen(["unshare", "--net", "sleep", "1000"]) as other:
        path = f"/proc/{other.pid}/ns/net"
        while os.readlink(path) == home:
            os.sched_yield()
        with in_network_namespace(path):
            assert os.readlink("/proc/thread-self/ns/net") == os.readlink(path)
        assert os.readlink("/proc/thread-self/ns/net") == home
        other.kill()
    with pytest.raises(KernelError), in_network_namespace("/no/such/namespace"):
        pass


PRINT = "import time; print(time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME))"


@pytest.mark.parametrize("offset_s", [1000, -0.25])
def test_a_command_runs_with_its_monotonic_clock_shifted_and_boottime_as_it_is(offset_s: float) -> None:
    argv = timens.run_in_time_namespace([sys.executable, "-c", PRINT], int(offset_s * 1e9))
    before_ns = (time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    output = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    after_ns = (time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    monotonic_ns, boottime_ns = map(int, output.split())
    assert before_ns[0] <= monotonic_ns - offset_s * 1e9 <= after_ns[0]
    assert before_ns[1] <= boottime_ns <= after_ns[1]


def test_offsets_add_up_in_a_nested_time_namespace() -> None:
    inner = timens.run_in_time_namespace([sys.executable, "-c", PRINT], 7 * 10**9)
    before_ns = time.monotonic_ns()
    done = subprocess.run(timens.run_in_time_namespace(inner, 100 * 10**9), capture_output=True, text=True, check=True)
    assert before_ns <= int(done.stdout.split()[0]) - 107 * 10**9 <= time.monotonic_ns()


def test_the_status_of_the_command_is_passed_on() -> None:
    for argv, status in ((["false"], 1), (["sh", "-c", "kill -9 $$"], 137), (["/no/such/command"], 127)):
        assert subprocess.run(timens.run_in_time_namespace(argv, 10**9), capture_output=True).returncode == status
    assert timens.run_in_time_namespace(["true"], 0) == ["true"]
