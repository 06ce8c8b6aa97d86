"""Reading pages out of a process on the source, and writing them into one on the target."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator, Sequence

import numpy as np

from agent.kernel import pagemap
from agent.kernel.memory import open_mem, process_vm_writev
from agent.kernel.pidfd import pidfd_open
from agent.kernel.procfs import read_start_time
from agent.kernel.types import Fd
from protocol.errors import KernelError, MigrateError, TaskGoneError
from protocol.pages import PAGE_BYTES

Runs = list[tuple[int, int]]  # (address, size in bytes)

# UIO_MAXIOV of linux/uio.h.
_MAX_IOVECS = 1024
_WORDS_PER_PAGE = PAGE_BYTES // 8
_PAGEMAP_IN_USE = np.uint64(pagemap.ENTRY_PRESENT | pagemap.ENTRY_SWAPPED)
_ZERO_PIECE_BYTES = 1 << 20


def cut_runs(starts: Sequence[int], sizes: Sequence[int], batch_bytes: int) -> Iterator[Runs]:
    """The runs in batches of at most `batch_bytes`: neighbours joined, large ones cut, each batch ascending."""
    batch: Runs = []
    total = 0
    for run_start, run_size in zip(starts, sizes, strict=True):
        start, left = run_start, run_size
        while left > 0:
            last_end = batch[-1][0] + batch[-1][1] if batch else 0
            if total == batch_bytes or start < last_end or len(batch) == _MAX_IOVECS:
                yield batch
                batch, total, last_end = [], 0, 0
            size = min(left, batch_bytes - total)
            if batch and start == last_end:
                batch[-1] = (batch[-1][0], batch[-1][1] + size)
            else:
                batch.append((start, size))
            start, left, total = start + size, left - size, total + size
    if batch:
        yield batch


def split_zero(runs: Runs, data: memoryview) -> tuple[Runs, Runs, memoryview | bytes]:
    """Part `runs`, whose contents are `data`, into those that are not zero and those that are; gives what is left."""
    words = np.frombuffer(data, np.uint64).reshape(-1, _WORDS_PER_PAGE)
    # Three words of each page rule out nearly all that are not zero without looking at the rest.
    suspects = np.flatnonzero((words[:, 0] | words[:, _WORDS_PER_PAGE // 2] | words[:, -1]) == 0)
    if suspects.size == 0:
        return runs, [], data
    is_zero = np.zeros(len(words), np.bool_)
    is_zero[suspects] = np.bitwise_or.reduce(words[suspects], axis=1) == 0
    if not is_zero.any():
        return runs, [], data
    addresses = np.concatenate([np.arange(start, start + size, PAGE_BYTES, dtype=np.uint64) for start, size in runs])
    return _join(addresses[~is_zero]), _join(addresses[is_zero]), words[~is_zero].tobytes()


def _join(addresses: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> Runs:
    """Ascending page addresses as runs."""
    if addresses.size == 0:
        return []
    breaks = np.flatnonzero(np.diff(addresses) != PAGE_BYTES) + 1
    first = addresses[np.concatenate(([0], breaks))]
    last = addresses[np.concatenate((breaks - 1, [addresses.size - 1]))]
    return list(zip(first.tolist(), (last - first + np.uint64(PAGE_BYTES)).tolist(), strict=True))


class _Task:
    """A process of which it is sure that it is the one that was meant."""

    def __init__(self, pid: int, expected_start_time: int) -> None:
        self.pid = pid
        self._pidfd = pidfd_open(pid)
        try:
            # Looked at after the pidfd is held: a number that was recycled before shows here.
            if read_start_time(pid) != expected_start_time:
                raise TaskGoneError(f"process {pid} is gone, another one has its number")
        except BaseException:
            os.close(self._pidfd)
            raise

    def is_gone(self) -> bool:
        """Whether it has exited; also when nobody has waited for it yet."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        os.close(self._pidfd)


class TaskReader(_Task):
    """Memory of a process, read by pread on /proc/PID/mem: process_vm_readv un-shares copy-on-write pages."""

    def __init__(self, pid: int, expected_start_time: int) -> None:
        super().__init__(pid, expected_start_time)
        try:
            self._mem_fd = open_mem(pid)
        except MigrateError:
            super().close()
            raise

    def read(self, runs: Runs, buffer: memoryview) -> Runs:
        """Read `runs` one behind the other into `buffer`; gives the runs that were there, which are what it holds.

        Pages that were unmapped meanwhile are left out: the next layout says so to the target as well.
        Raises: TaskGoneError: the process has exited.
        """
        got: Runs = []
        position = 0
        for run_start, run_size in runs:
            start, end = run_start, run_start + run_size
            while start < end:
                read_bytes = self._read_piece(buffer[position : position + end - start], start)
                if read_bytes:
                    got.append((start, read_bytes))
                    position += read_bytes
                start += read_bytes
                if start < end:
                    start += PAGE_BYTES
        return got

    def _read_piece(self, view: memoryview, start: int) -> int:
        """Whole pages read at `start`; fewer than asked for: the next one cannot be."""
        try:
            size = os.preadv(self._mem_fd, [view], start)
        except OSError as error:
            if error.errno not in {errno.EIO, errno.EFAULT}:
                raise KernelError(f"preadv(/proc/{self.pid}/mem, {start:#x})", error.errno or 0, str(error)) from error
            size = 0
        if size < len(view) and self.is_gone():
            raise TaskGoneError(f"process {self.pid} ended while its memory was read")
        return size - size % PAGE_BYTES

    def close(self) -> None:
        os.close(self._mem_fd)
        super().close()


class TaskWriter(_Task):
    """Memory of a process that is being built."""

    def __init__(self, pid: int, expected_start_time: int) -> None:
        super().__init__(pid, expected_start_time)
        self._zeros = bytearray(_ZERO_PIECE_BYTES)

    def write(self, runs: Sequence[tuple[int, int]], data: bytes | bytearray | memoryview) -> None:
        """Write `data` over `runs`, in order. Raises: TaskGoneError. KernelError: an area is not there."""
        try:
            process_vm_writev(self.pid, runs, data)
        except KernelError as error:
            if self.is_gone():
                raise TaskGoneError(f"process {self.pid} ended while its memory was written") from error
            if error.errno != errno.EFAULT:
                raise
            self._write_forced(runs, memoryview(data))

    def write_zeros(self, runs: Sequence[tuple[int, int]]) -> None:
        """Make `runs`, which are anonymous memory, read as zero; pages that are not there do so already."""
        pagemap_fd = pagemap.open_pagemap(self.pid)
        try:
            for start, size in runs:
                for piece in range(start, start + size, _ZERO_PIECE_BYTES):
                    present = _in_use(pagemap_fd, piece, min(_ZERO_PIECE_BYTES, start + size - piece))
                    if present:
                        self.write(present, memoryview(self._zeros)[: sum(length for _, length in present)])
        finally:
            os.close(pagemap_fd)

    def _write_forced(self, runs: Sequence[tuple[int, int]], data: memoryview) -> None:
        """As a debugger writes: over private areas that are read-only too. Slower."""
        mem_fd = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            position = 0
            for start, size in runs:
                try:
                    done = os.pwrite(mem_fd, data[position : position + size], start)
                except OSError as error:
                    raise KernelError(
                        f"write of {size} bytes at {start:#x} of process {self.pid}", error.errno or 0,
                        f"{error.strerror}: no such area, or a shared one that is read-only",
                    ) from error  # fmt: skip
                if done != size:
                    raise KernelError(
                        f"write at {start + done:#x} of process {self.pid}", errno.EFAULT, "the area ends there"
                    )
                position += size
        finally:
            os.close(mem_fd)


def _in_use(pagemap_fd: Fd, start: int, size: int) -> Runs:
    """The parts of an area that have a page, in memory or in swap."""
    entries = pagemap.entries(pagemap_fd, start, size // PAGE_BYTES)
    indices = np.flatnonzero(entries & _PAGEMAP_IN_USE).astype(np.uint64)
    return _join(indices * np.uint64(PAGE_BYTES) + np.uint64(start))
