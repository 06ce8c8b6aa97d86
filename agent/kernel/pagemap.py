"""/proc/PID/pagemap: the PAGEMAP_SCAN ioctl (Linux 6.7) and the classic entries. Source: ioctl_pagemap_scan(2)."""

from __future__ import annotations

import enum
import errno
import fcntl
import functools
import os
import struct

import numpy as np
import numpy.typing as npt

from agent.kernel.syscalls import failure, os_failure
from agent.kernel.types import Fd

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

# linux/fs.h
PAGEMAP_SCAN = 0xC0606610
PM_SCAN_WP_MATCHING = 1
PM_SCAN_CHECK_WPASYNC = 2


class Category(enum.IntFlag):
    """PAGE_IS_* (linux/fs.h)"""

    NONE = 0
    WPALLOWED = 1
    WRITTEN = 2
    FILE = 4
    PRESENT = 8
    SWAPPED = 16
    PFNZERO = 32
    HUGE = 64
    SOFT_DIRTY = 128
    GUARD = 256  # Linux 6.15


# Documentation/admin-guide/mm/pagemap.rst: one u64 a page
ENTRY_PRESENT = 1 << 63
ENTRY_SWAPPED = 1 << 62
ENTRY_FILE = 1 << 61
ENTRY_GUARD = 1 << 58
ENTRY_EXCLUSIVE = 1 << 56
ENTRY_SOFT_DIRTY = 1 << 55
ENTRY_FRAME = (1 << 55) - 1

_ARGUMENT = struct.Struct("=12Q")  # struct pm_scan_arg
_REGION_WORDS = 3  # struct page_region: start, end, categories
_REGIONS_AT_ONCE = 32768

Regions = npt.NDArray[np.uint64]  # shape (n, 3): start, end, categories


def open_pagemap(pid: int) -> Fd:
    """Raises: KernelError, TaskGoneError."""
    path = f"/proc/{pid}/pagemap"
    try:
        return Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError as error:
        raise failure(f"open({path})", errno.ESRCH) from error
    except OSError as error:
        raise os_failure(f"open({path})", error) from error


@functools.cache
def _region_buffer() -> Regions:
    # One for the process: scans are made by its one tracer thread, and the result is copied out.
    return np.empty((_REGIONS_AT_ONCE, _REGION_WORDS), dtype=np.uint64)


def scan(
    pagemap: Fd,
    start: int,
    end: int,
    *,
    flags: int = 0,
    inverted: Category = Category.NONE,
    mask: Category = Category.NONE,
    any_of: Category = Category.NONE,
    returned: Category = Category.NONE,
) -> Regions:
    """The page ranges in [start, end) whose categories match: (n, 3) of start, end, categories asked for.

    Not to be called by two threads at once.
    Raises: KernelError: EPERM when PM_SCAN_CHECK_WPASYNC meets an area that is not watched. TaskGoneError.
    """
    buffer = _region_buffer()
    address = buffer.ctypes.data
    parts: list[Regions] = []
    while start < end:
        argument = bytearray(
            _ARGUMENT.pack(
                _ARGUMENT.size, flags, start, end, 0, address, _REGIONS_AT_ONCE, 0, inverted, mask, any_of, returned
            )
        )
        try:
            count = fcntl.ioctl(pagemap, PAGEMAP_SCAN, argument)
        except OSError as error:
            raise os_failure(f"ioctl(PAGEMAP_SCAN, {start:#x}-{end:#x})", error) from error
        walk_end = int.from_bytes(argument[32:40], "little")
        if count:
            parts.append(buffer[:count].copy())
        if walk_end <= start:
            break
        start = walk_end
    if not parts:
        return buffer[:0]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def scan_written(pagemap: Fd, start: int, end: int) -> Regions:
    """Written pages by the kernel's fast path (0.7 ms a GB): no re-arming, no other category.

    The fast path is taken only when WRITTEN alone is asked for and returned.
    """
    return scan(
        pagemap, start, end, flags=PM_SCAN_CHECK_WPASYNC, mask=Category.WRITTEN, returned=Category.WRITTEN
    )  # fmt: skip


@functools.cache
def knows_guard_pages() -> bool:
    """Whether PAGEMAP_SCAN can tell guard pages (MADV_GUARD_INSTALL)."""
    pagemap = open_pagemap(os.getpid())
    try:
        # An empty range of a valid address: only the categories are looked at.
        argument = bytearray(
            _ARGUMENT.pack(
                _ARGUMENT.size, 0, PAGE_BYTES, 2 * PAGE_BYTES, 0, _region_buffer().ctypes.data, 1, 0, 0, Category.GUARD,
                0, Category.GUARD,
            )
        )  # fmt: skip
        fcntl.ioctl(pagemap, PAGEMAP_SCAN, argument)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise os_failure("ioctl(PAGEMAP_SCAN, GUARD)", error) from error
    finally:
        os.close(pagemap)
    return True


def entries(pagemap: Fd, start: int, pages: int) -> npt.NDArray[np.uint64]:
    """The classic entries of `pages` pages from `start`, shape (pages,). Frame numbers need CAP_SYS_ADMIN."""
    size = 8 * pages
    try:
        data = os.pread(pagemap, size, start // PAGE_BYTES * 8)
    except OSError as error:
        raise os_failure(f"pread(pagemap, {start:#x}, {pages} pages)", error) from error
    if len(data) != size:
        raise failure(f"pread(pagemap, {start:#x}, {pages} pages)", errno.ESRCH, "the address space is gone")
    return np.frombuffer(data, dtype=np.uint64)
