from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from agent.kernel import procfs
from protocol.errors import TaskGoneError
from tests.kernel.programs import puppet


def test_maps_tell_deleted_files_and_names_with_a_newline(tmp_path: Path) -> None:
    path = tmp_path / "two\nlines"
    path.write_bytes(b"x" * 8192)
    with puppet() as it:
        it.do(f"m = mmap.mmap(os.open({str(path)!r}, os.O_RDWR), 8192)")
        area = next(a for a in procfs.read_maps(it.pid) if "two" in a.path)
        status = path.stat()
        assert (area.path, area.deleted, area.inode, area.device) == (str(path), False, status.st_ino, status.st_dev)
        assert (area.perms, area.size_bytes, area.offset, area.is_shared, area.protection) == ("rw-s", 8192, 0, True, 3)
        path.unlink()
        area = next(a for a in procfs.read_maps(it.pid) if "two" in a.path)
        assert (area.path, area.deleted) == (str(path), True)


def test_every_line_of_maps_is_parsed() -> None:
    data = procfs.read_proc("/proc/self/maps")
    areas = procfs.parse_maps(data)
    assert len(areas) == data.count(b"\n")
    assert {"[heap]", "[stack]", "[vdso]"} <= {area.path for area in areas}
    assert all(a.start < a.end for a in areas)


def test_a_thousand_areas_are_parsed_in_3_ms() -> None:
    line = b"7f0000000000-7f0000001000 rw-p 00001000 fd:01 %d                     /usr/lib/libx-%d.so\n"
    data = b"".join(line % (i, i % 40) for i in range(1000))
    taken = []
    for _ in range(10):
        began = time.perf_counter()
        assert len(procfs.parse_maps(data)) == 1000
        taken.append(time.perf_counter() - began)
    assert min(taken) < 0.003


def test_vm_flags_are_found_by_area() -> None:
    stack = next(area for area in procfs.read_maps(os.getpid()) if area.path == "[stack]")
    assert "gd" in procfs.read_vm_flags(os.getpid())[stack.start]


def test_status_and_stat_tell_what_python_knows() -> None:
    status, stat = procfs.read_status(os.getpid()), procfs.read_stat(os.getpid())
    assert (status.pid, status.tgid, status.ppid, status.ns_pid[-1]) == (
        os.getpid(),
        os.getpid(),
        os.getppid(),
        os.getpid(),
    )
    assert status.groups == tuple(os.getgroups())
    assert (stat.pid, stat.ppid, stat.pgid, stat.sid) == (os.getpid(), os.getppid(), os.getpgrp(), os.getsid(0))
    assert stat.start_time_ticks == procfs.read_start_time(os.getpid()) > 0
    assert os.getpid() in procfs.task_ids(os.getpid())


def test_a_name_with_parentheses_and_spaces_does_not_shift_the_fields() -> None:
    with puppet() as it:
        it.do("open('/proc/self/comm', 'w').write('a) S (b')")
        stat = procfs.read_stat(it.pid)
        assert (stat.name, stat.ppid) == ("a) S (b", os.getpid())
        assert procfs.read_comm(it.pid) == b"a) S (b"
        assert it.pid in procfs.children(os.getpid())


def test_fdinfo_has_common_fields_and_lines_of_its_kind() -> None:
    with puppet() as it:
        number = it.do("import select; e = select.epoll(); e.register(0, select.EPOLLIN); answer = e.fileno()")
        info = procfs.read_fdinfo(it.pid, int(str(number)))
        assert info.flags & os.O_CLOEXEC
        assert len(info.lines_of("tfd:")) == 1


def test_a_dead_process_is_gone() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    for read in (procfs.read_maps, procfs.read_status, procfs.read_stat, procfs.task_ids, procfs.descriptors):
        with pytest.raises(TaskGoneError):
            read(child.pid)
