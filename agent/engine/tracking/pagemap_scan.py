"""Dirty pages by userfaultfd (asynchronous write protection) and PAGEMAP_SCAN: Linux 6.7 on x86-64, 6.10 on arm64.

A page is 'written' from when it was first touched until a scan marks it clean; a write clears the mark in the fault,
which costs the process about a microsecond and stops nothing. The userfaultfd is made by the process itself, in an
injected call, because it belongs to the address space of its maker; it is then taken out and closed there.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from agent.arch import SYS
from agent.engine.native.remote import RemoteSyscalls
from agent.engine.native.tracee import Tracee
from agent.engine.tracking.base import Run, Scan
from agent.kernel import pagemap, pidfd, procfs, userfaultfd
from agent.kernel.pagemap import Category, Regions
from agent.kernel.procfs import MemoryArea
from agent.kernel.types import Fd, Pid, Tid
from protocol.errors import KernelError, TaskGoneError, UnsupportedError

_RE_ARM = pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC
_KINDS = Category.FILE | Category.PRESENT | Category.SWAPPED | Category.PFNZERO


class PagemapScanTracker:
    """Implements tracking.base.DirtyTracker."""

    def __init__(self) -> None:
        self.stop_ms = 0.0
        self._pid = 0
        self._uffd: Fd | None = None
        self._pagemap: Fd | None = None
        self._untracked: dict[tuple[int, int], MemoryArea] = {}
        self._returned = _KINDS | (Category.GUARD if pagemap.knows_guard_pages() else Category.NONE)

    # ---------------------------------------------------------------- arm and close

    def arm(self, pid: int) -> None:
        tracee = _stop_some_thread(pid)
        began = time.perf_counter()
        try:
            with RemoteSyscalls(tracee) as remote:
                self._take_userfaultfd(pid, remote)
        finally:
            tracee.forgive_interruption()
            tracee.detach()
            self.stop_ms = (time.perf_counter() - began) * 1e3
        self._open(pid)

    def arm_stopped(self, remote: RemoteSyscalls) -> None:
        """As `arm`, for a process that stands at a stop already (a new child)."""
        self._take_userfaultfd(remote.tracee.pid, remote)
        self._open(remote.tracee.pid)

    def _take_userfaultfd(self, pid: int, remote: RemoteSyscalls) -> None:
        try:
            # User mode only: needs neither a capability nor the sysctl, and writes by the kernel are seen all the same.
            flags = userfaultfd.O_CLOEXEC | userfaultfd.UFFD_USER_MODE_ONLY
            number = remote.call(SYS.userfaultfd, flags)
        except KernelError as error:
            if error.errno in {errno.ENOSYS, errno.EINVAL, errno.EPERM}:
                raise _no_tracker(f"process {pid} may not make a userfaultfd ({error})") from error
            raise
        try:
            process = pidfd.pidfd_open(pid)
            try:
                self._uffd = pidfd.pidfd_getfd(process, number)
            finally:
                os.close(process)
        finally:
            remote.call(SYS.close, number)

    def _open(self, pid: int) -> None:
        assert self._uffd is not None
        try:
            userfaultfd.enable(self._uffd)
            self._pagemap = pagemap.open_pagemap(pid)
            self._pid = pid
        except KernelError as error:
            self.close()
            if error.errno == errno.EINVAL:
                raise _no_tracker("userfaultfd has no asynchronous write protection") from error
            raise
        except TaskGoneError:
            self.close()
            raise

    def close(self) -> None:
        for descriptor in (self._uffd, self._pagemap):
            if descriptor is not None:
                os.close(descriptor)
        self._uffd = self._pagemap = None

    # ---------------------------------------------------------------- rounds

    def scan_round(self, areas: Sequence[MemoryArea]) -> Scan:
        self._forget_untracked(areas)
        copies: list[Regions] = []
        holes: list[Regions] = []
        for group in _contiguous(areas):
            for area, regions, _ in self._scan_group(group, _RE_ARM):
                _sort_out(area, regions, copies, holes)
        return Scan(_runs(copies), _runs(holes), list(self._untracked.values()))

    def scan_final(self, areas: Sequence[MemoryArea]) -> list[Run]:
        self._forget_untracked(areas)
        descriptor = self._descriptor()
        copies: list[Regions] = []
        for group in _contiguous(areas):
            if not any(self._is_untracked(area) for area in group):
                try:
                    copies.append(pagemap.scan_written(descriptor, group[0].start, group[-1].end))
                    continue
                except KernelError as error:
                    if error.errno != errno.EPERM:
                        raise
            # An area that is new since the last round is in the group: everything in it is to be sent.
            ignored: list[Regions] = []
            for area, regions, is_new in self._scan_group(group, pagemap.PM_SCAN_CHECK_WPASYNC):
                if is_new:
                    _sort_out(area, regions, copies, ignored)
                else:
                    # Dropped pages too, as on the fast path: the target has the contents from before.
                    copies.append(regions)
        return self._without_guards(_runs(copies))

    def _scan_group(self, group: Sequence[MemoryArea], flags: int) -> Iterator[tuple[MemoryArea, Regions, bool]]:
        """Each watchable area, its written regions and whether it is new: those are registered on the way.

        Known limit of the kernel (6.18): MADV_GUARD_INSTALL in a watched shared or file mapping does not return.
        """
        for area in group:
            if self._is_untracked(area):
                continue
            try:
                yield area, self._scan_area(area, flags), False
            except KernelError as error:
                if error.errno != errno.EPERM:
                    raise
                if self._register(area):
                    yield area, self._scan_area(area, flags), True

    def _scan_area(self, area: MemoryArea, flags: int) -> Regions:
        return pagemap.scan(
            self._descriptor(), area.start, area.end, flags=flags, mask=Category.WRITTEN, returned=self._returned
        )

    def _register(self, area: MemoryArea) -> bool:
        assert self._uffd is not None
        try:
            userfaultfd.register_write_protect(self._uffd, area.start, area.size_bytes)
        except KernelError as error:
            # EPERM: a shared mapping of an object that may not be written. EINVAL: memory that cannot be watched.
            if error.errno in {errno.EPERM, errno.EINVAL}:
                self._untracked[area.start, area.end] = area
                return False
            raise
        return True

    def _is_untracked(self, area: MemoryArea) -> bool:
        return (area.start, area.end) in self._untracked

    def _forget_untracked(self, areas: Sequence[MemoryArea]) -> None:
        """An area that changed its nature or is gone is tried anew."""
        if self._untracked:
            present = {(area.start, area.end): area for area in areas}
            self._untracked = {key: area for key, area in self._untracked.items() if present.get(key) == area}

    def _descriptor(self) -> Fd:
        assert self._pagemap is not None, "arm first"
        return self._pagemap

    def _without_guards(self, runs: list[Run]) -> list[Run]:
        """The fast path tells guard pages as written, but they cannot be read: only the few runs found are asked."""
        if not self._returned & Category.GUARD:
            return runs
        result: list[Run] = []
        for start, end in runs:
            guards = pagemap.scan(
                self._descriptor(), start, end, mask=Category.GUARD, returned=Category.GUARD
            )  # fmt: skip
            at = start
            for guard_start, guard_end, _ in guards.tolist():
                if at < guard_start:
                    result.append((at, guard_start))
                at = guard_end
            if at < end:
                result.append((at, end))
        return result


def _no_tracker(why: str) -> UnsupportedError:
    return UnsupportedError(
        f"dirty pages cannot be tracked here: {why}",
        code="no-tracker",
        hint="Linux 6.7 (x86-64) or 6.10 (arm64) is needed, or use --strategy stop-copy",
    )


def _stop_some_thread(pid: int) -> Tracee:
    """The first thread that can be stopped: the leader, but for a process whose leader has ended."""
    tids = procfs.task_ids(pid)
    for tid in tids:
        tracee = Tracee(Tid(tid), Pid(pid))
        try:
            tracee.seize()
        except (KernelError, TaskGoneError):
            if tid == tids[-1]:
                raise
            continue
        tracee.interrupt()
        tracee.wait_stop()
        return tracee
    raise TaskGoneError(f"process {pid} has no threads")


def _contiguous(areas: Sequence[MemoryArea]) -> Iterator[list[MemoryArea]]:
    """Runs of areas without gaps, kernel pages left out."""
    wanted = [area for area in areas if not area.is_kernel_page]
    if not wanted:
        return
    group = [wanted[0]]
    for before, area in pairwise(wanted):
        if before.end != area.start:
            yield group
            group = []
        group.append(area)
    yield group


def _sort_out(area: MemoryArea, regions: Regions, copies: list[Regions], holes: list[Regions]) -> None:
    if not len(regions):
        return
    kinds = regions[:, 2]
    guard = _has(kinds, Category.GUARD)
    # Never populated, dropped by MADV_DONTNEED, or mapped to the zero page: it reads as zero or as its file.
    hole = ~_has(kinds, Category.PRESENT | Category.SWAPPED) | _has(kinds, Category.PFNZERO)
    if area.is_file and not area.is_shared:
        hole |= _has(kinds, Category.FILE)  # not copied yet: the file has it
    holes.append(regions[hole & ~guard])
    copies.append(regions[~hole & ~guard])


def _has(kinds: npt.NDArray[np.uint64], category: Category) -> npt.NDArray[np.bool_]:
    result: npt.NDArray[np.bool_] = (kinds & np.uint64(category)) != 0
    return result


def _runs(parts: list[Regions]) -> list[Run]:
    """Joined where they touch."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return []
    regions = np.concatenate(parts)
    starts, ends = regions[:, 0], regions[:, 1]
    breaks = np.flatnonzero(starts[1:] != ends[:-1])
    first = np.concatenate(([0], breaks + 1))
    last = np.concatenate((breaks, [len(regions) - 1]))
    return list(zip(starts[first].tolist(), ends[last].tolist(), strict=True))
