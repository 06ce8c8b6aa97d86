from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.engine.tracking.base import DirtyTracker, Run
from agent.engine.tracking.pagemap_scan import PagemapScanTracker
from agent.kernel import memory, pagemap, procfs
from protocol.errors import TaskGoneError
from tests.kernel.programs import Puppet, puppet

PAGE = 4096
PAGES = 1024
MAP = f"m = mmap.mmap(-1, {PAGES * PAGE}, flags=%d); answer = ctypes.addressof(ctypes.c_char.from_buffer(m))"
ANONYMOUS = 0x22
SHARED = 0x21


class Watched:
    """A puppet with a mapping of PAGES pages, all written, and a tracker that has seen them all."""

    def __init__(self, it: Puppet, flags: int = ANONYMOUS) -> None:
        self.it = it
        self.base = int(str(it.do(MAP % flags)))
        it.do(f"for i in range({PAGES}): m[4096 * i] = 1")
        self.tracker = PagemapScanTracker()
        self.tracker.arm(it.pid)
        first = self.tracker.scan_round(self.areas())
        assert self.pages(first.copy) == list(range(PAGES))

    def areas(self) -> list[procfs.MemoryArea]:
        return procfs.read_maps(self.it.pid)

    def pages(self, runs: list[Run]) -> list[int]:
        end = self.base + PAGES * PAGE
        return [
            (address - self.base) // PAGE
            for start, stop in runs
            for address in range(start, stop, PAGE)
            if self.base <= address < end
        ]

    def round(self) -> tuple[list[int], list[int]]:
        scan = self.tracker.scan_round(self.areas())
        return self.pages(scan.copy), self.pages(scan.holes)

    def final(self) -> list[int]:
        return self.pages(self.tracker.scan_final(self.areas()))


@pytest.mark.parametrize("flags", [ANONYMOUS, SHARED])
def test_exactly_the_written_pages_are_found(flags: int) -> None:
    with puppet() as it:
        watched = Watched(it, flags)
        assert watched.round() == ([], [])
        it.do("m[4096 * 5] = m[4096 * 6] = m[4096 * 900] = 2")
        assert watched.final() == [5, 6, 900]
        assert watched.final() == [5, 6, 900]  # nothing was watched afresh
        assert watched.round() == ([5, 6, 900], [])
        assert watched.round() == ([], [])
        watched.tracker.close()


def test_writes_from_outside_are_seen() -> None:
    with puppet() as it:
        watched = Watched(it)
        memory.process_vm_write(it.pid, watched.base + 7 * PAGE, b"x")
        mem = memory.open_mem(it.pid, writable=True)
        os.pwrite(mem, b"x", watched.base + 9 * PAGE)
        os.close(mem)
        it.do("r, w = os.pipe(); os.write(w, b'abc'); os.readv(r, [memoryview(m)[4096 * 11 : 4096 * 11 + 3]])")
        assert watched.final() == [7, 9, 11]
        watched.tracker.close()


def test_dropped_pages_are_holes() -> None:
    with puppet() as it:
        watched = Watched(it)
        it.do("m.madvise(mmap.MADV_DONTNEED, 4096 * 20, 4096 * 3)")
        assert watched.round() == ([], [20, 21, 22])
        assert watched.round() == ([], [])
        it.do("x = m[4096 * 20]")  # reading brings the zero page
        assert watched.round()[0] == []
        it.do("m[4096 * 20] = 1")
        assert watched.final() == [20]
        watched.tracker.close()


def test_pages_dropped_in_the_last_moment_are_sent_as_they_read() -> None:
    with puppet() as it:
        watched = Watched(it)
        it.do("m.madvise(mmap.MADV_DONTNEED, 4096 * 20, 4096)")
        assert watched.final() == [20]
        it.do("extra = mmap.mmap(-1, 4096, flags=0x22)")
        it.do("extra[0] = 1")
        assert watched.final() == [20]
        watched.tracker.close()


def test_guard_pages_are_never_to_be_read() -> None:
    assert pagemap.knows_guard_pages()
    with puppet() as it:
        watched = Watched(it)
        it.do("m.madvise(102, 4096 * 30, 4096); m[4096 * 29] = m[4096 * 31] = 2")  # MADV_GUARD_INSTALL
        assert watched.final() == [29, 31]
        assert watched.round() == ([29, 31], [])
        watched.tracker.close()


def test_a_new_area_is_found_by_the_next_round_and_by_the_final_scan() -> None:
    with puppet() as it:
        watched = Watched(it)
        new = int(
            str(it.do("n = mmap.mmap(-1, 40960, flags=0x22); answer = ctypes.addressof(ctypes.c_char.from_buffer(n))"))
        )
        it.do("n[4096 * 3] = 1")
        wanted = (new + 3 * PAGE, new + 4 * PAGE)
        assert any(
            start <= wanted[0] and wanted[1] <= end for start, end in watched.tracker.scan_final(watched.areas())
        )
        assert any(
            start <= wanted[0] and wanted[1] <= end for start, end in watched.tracker.scan_round(watched.areas()).copy
        )
        assert not [run for run in watched.tracker.scan_round(watched.areas()).copy if new <= run[0] < new + 40960]
        watched.tracker.close()


def test_an_area_moved_by_mremap_reads_as_written() -> None:
    with puppet() as it:
        watched = Watched(it)
        it.do("libc.mremap.restype = ctypes.c_void_p; libc.mremap.argtypes = [ctypes.c_void_p] + [ctypes.c_size_t] * 4")
        target = int(
            str(it.do(f"answer = libc.mremap({watched.base}, {PAGES * PAGE}, {PAGES * PAGE}, 3, 0x200000000)"))
        )
        assert target == 0x200000000
        copied = [run for run in watched.tracker.scan_round(watched.areas()).copy if run[0] >= target]
        assert copied[0] == (target, target + PAGES * PAGE)
        watched.tracker.close()


def test_pages_of_a_private_file_mapping_are_sent_only_when_changed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 16 * PAGE)
    with puppet() as it:
        it.do(f"f = mmap.mmap(os.open({str(path)!r}, os.O_RDONLY), {16 * PAGE}, flags=2, prot=3)")
        base = int(
            str(it.do("f[4096 * 2] = 1; x = f[4096 * 4]; answer = ctypes.addressof(ctypes.c_char.from_buffer(f))"))
        )
        tracker: DirtyTracker = PagemapScanTracker()
        tracker.arm(it.pid)
        copies = tracker.scan_round(procfs.read_maps(it.pid)).copy
        assert [run for run in copies if base <= run[0] < base + 16 * PAGE] == [(base + 2 * PAGE, base + 3 * PAGE)]
        it.do("x = f[4096 * 5]; f[4096 * 6] = 1")
        copies = tracker.scan_round(procfs.read_maps(it.pid)).copy
        assert [run for run in copies if base <= run[0] < base + 16 * PAGE] == [(base + 6 * PAGE, base + 7 * PAGE)]
        tracker.close()


def test_what_cannot_be_watched_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * PAGE)
    with puppet() as it:
        it.do(f"f = mmap.mmap(os.open({str(path)!r}, os.O_RDONLY), 4096, prot=1)")
        tracker = PagemapScanTracker()
        tracker.arm(it.pid)
        for _ in range(2):
            untracked = tracker.scan_round(procfs.read_maps(it.pid)).untracked
            assert str(path) in {area.path for area in untracked}
        assert not [run for run in tracker.scan_final(procfs.read_maps(it.pid)) if run[0] == untracked[0].start]
        tracker.close()


def test_a_process_that_execs_has_to_be_tracked_anew() -> None:
    with puppet() as it:
        watched = Watched(it)
        areas = watched.areas()
        assert it.process.stdin is not None
        it.process.stdin.write("os.execv('/bin/sleep', ['sleep', '1000'])\n")
        it.process.stdin.flush()
        while procfs.read_comm(it.pid) != b"sleep":
            os.sched_yield()
        with pytest.raises(TaskGoneError):
            watched.tracker.scan_round(procfs.read_maps(it.pid))
        del areas
        watched.tracker.close()
        watched.tracker.close()


def test_arming_stops_the_process_for_milliseconds_and_leaves_no_descriptor() -> None:
    with puppet() as it:
        before = procfs.descriptors(it.pid)
        tracker = PagemapScanTracker()
        tracker.arm(it.pid)
        assert 0 < tracker.stop_ms < 50
        assert procfs.descriptors(it.pid) == before
        tracker.close()
