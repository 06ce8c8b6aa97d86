"""Reading pages out of a process on the source, and writing them into one on the target."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from protocol.errors import KernelError, TaskGoneError
from protocol.pages import PAGE_BYTES

Runs = list[tuple[int, int]]  # (address, size in bytes)

# UIO_MAXIOV of linux/uio.h.
_MAX_IOVECS = 1024
_WORDS_PER_PAGE = PAGE_BYTES // 8
_PAGEMAP_IN_USE = np.uint64(3 << 62)  # present (bit 63) or swapped (bit 62)
_ZERO_PIECE_BYTES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_writev.restype = ctypes.c_ssize_t
_libc.process_vm_writev.argtypes = [
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
]  # fmt: skip


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
    """Part the runs, whose contents are `data`, into those with contents, those that are zero, and the contents left."""
    words = np.frombuffer(data, np.uint64).reshape(-1, _WORDS_PER_PAGE)
    # Three words of each page rule out nearly all that are not zero without looking at the rest.
    suspects = np.flatnonzero((words[:, 0] | words[:, _WORDS_PER_PAGE // 2] | words[:, -1]) == 0)
    if suspects.size == 0:
        return runs, [], data
    is_zero = np.zeros(len(words), np.bool_)
    is_zero[suspects] = np.bitwise_or.reduce(words[suspects], axis=1) == 0
    if not is_zero.any():
        return runs, [], data
    addresses = np.concatenate([np.arange(start, start + size, PAGE_BYTES, np.uint64) for start, size in runs])
    return _join(addresses[~is_zero]), _join(addresses[is_zero]), words[~is_zero].tobytes()


def _join(addresses: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> Runs:
    """Ascending page addresses as runs."""
    if addresses.size == 0:
        return []
    breaks = np.flatnonzero(np.diff(addresses) != PAGE_BYTES) + 1
    first = addresses[np.concatenate(([0], breaks))]
    last = addresses[np.concatenate((breaks - 1, [addresses.size - 1]))]
    return list(zip(first.tolist(), (last - first + np.uint64(PAGE_BYTES)).tolist(), strict=True))


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat, clock ticks. Raises: TaskGoneError.   Source: proc(5)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TaskGoneError(f"process {pid} is gone") from error
    # The name in brackets may hold spaces and brackets of its own.
    return int(text[text.rindex(b")") + 2 :].split()[19])


class _Task:
    """A process of which it is sure that it is the one that was meant."""

    def __init__(self, pid: int, expected_start_time: int) -> None:
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise TaskGoneError(f"process {pid} is gone") from error
        try:
            # Looked at after the pidfd is held: a number that was recycled before shows here.
            if start_time(pid) != expected_start_time:
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
            self._mem_fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            super().close()
            raise TaskGoneError(f"memory of process {pid} cannot be opened: {error.strerror}") from error

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
        self._zeros = bytes(_ZERO_PIECE_BYTES)

    def write(self, runs: Sequence[tuple[int, int]], data: bytes | bytearray | memoryview) -> None:
        """Write `data` over `runs`, in order. Raises: TaskGoneError. KernelError: an area is not there."""
        address = np.frombuffer(data, np.uint8).ctypes.data
        for index in range(0, len(runs), _MAX_IOVECS):
            some = runs[index : index + _MAX_IOVECS]
            self._write_some(some, address)
            address += sum(size for _, size in some)

    def write_zeros(self, runs: Sequence[tuple[int, int]]) -> None:
        """Make `runs`, which are anonymous memory, read as zero; pages that are not there do so already."""
        with contextlib.closing(_Pagemap(self.pid)) as pagemap:
            for start, size in runs:
                for piece in range(start, start + size, _ZERO_PIECE_BYTES):
                    present = pagemap.in_use(piece, min(_ZERO_PIECE_BYTES, start + size - piece))
                    if present:
                        self.write(present, memoryview(self._zeros)[: sum(length for _, length in present)])

    def _write_some(self, runs: Sequence[tuple[int, int]], address: int) -> None:
        total = sum(size for _, size in runs)
        # struct iovec twice: what is written, contiguous here, and where it goes.
        local = struct.pack("<QQ", address, total)
        remote = struct.pack(f"<{2 * len(runs)}Q", *(value for run in runs for value in run))
        done = _libc.process_vm_writev(self.pid, local, 1, remote, len(runs), 0)
        if done == total:
            return
        error = ctypes.get_errno() if done < 0 else 0
        if error == errno.ESRCH or self.is_gone():
            raise TaskGoneError(f"process {self.pid} ended while its memory was written")
        if error not in {0, errno.EFAULT}:
            raise KernelError(f"process_vm_writev({self.pid})", error, os.strerror(error))
        self._write_forced(runs, address)

    def _write_forced(self, runs: Sequence[tuple[int, int]], address: int) -> None:
        """As a debugger writes: over private areas that are read-only too. Slower."""
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as mem:  # noqa: PTH123 - unbuffered
            for start, size in runs:
                content = ctypes.string_at(address, size)
                try:
                    written = os.pwrite(mem.fileno(), content, start)
                except OSError as error:
                    written = 0 if error.errno in {errno.EIO, errno.EFAULT} else -1
                if written != size:
                    if self.is_gone():
                        raise TaskGoneError(f"process {self.pid} ended while its memory was written")
                    raise KernelError(
                        f"write of {size} bytes at {start + max(written, 0):#x} of process {self.pid}", errno.EFAULT,
                        "no such area, or a shared one that is read-only",
                    )  # fmt: skip
                address += size


class _Pagemap:
    """Source: Documentation/admin-guide/mm/pagemap.rst."""

    def __init__(self, pid: int) -> None:
        try:
            self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TaskGoneError(f"pagemap of process {pid} cannot be opened: {error.strerror}") from error

    def in_use(self, start: int, size: int) -> Runs:
        """The parts of an area that have a page, in memory or in swap."""
        data = os.pread(self._fd, size // PAGE_BYTES * 8, start // PAGE_BYTES * 8)
        entries = np.frombuffer(data, np.uint64)
        indices = np.flatnonzero(entries & _PAGEMAP_IN_USE).astype(np.uint64)
        return _join(indices * np.uint64(PAGE_BYTES) + np.uint64(start))

    def close(self) -> None:
        os.close(self._fd)
