"""Memory of other processes.

Reading pages in bulk is done by pread on /proc/PID/mem: process_vm_readv un-shares pages that relatives share
copy-on-write. The process_vm calls serve small reads (records that a remote call filled in) and writes.
Source: process_vm_readv(2), proc_pid_mem(5).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import Any

from agent.kernel.syscalls import IoVector, failure, get_errno, libc, os_failure
from agent.kernel.types import Fd

_readv = libc.process_vm_readv
_writev = libc.process_vm_writev
for _function in (_readv, _writev):
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]
IOV_MAX = 1024  # linux/uio.h, UIO_MAXIOV


def _pinned(data: bytes | bytearray | memoryview) -> tuple[int, int, Any]:
    """(address, size, owner) of a buffer in our memory; valid while the owner is alive."""
    if isinstance(data, bytes):
        pointer = ctypes.c_char_p(data)
        return ctypes.cast(pointer, ctypes.c_void_p).value or 0, len(data), (pointer, data)
    view = memoryview(data).cast("B")
    if view.readonly:
        return _pinned(bytes(view))
    array = (ctypes.c_char * len(view)).from_buffer(view)
    return ctypes.addressof(array), len(view), array


def process_vm_read(pid: int, address: int, size_bytes: int) -> bytes:
    """Raises: KernelError: EFAULT, not all of it is mapped and readable. TaskGoneError."""
    buffer = ctypes.create_string_buffer(size_bytes)
    local = IoVector(ctypes.addressof(buffer), size_bytes)
    remote = IoVector(address, size_bytes)
    done = _readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if done != size_bytes:
        _raise("process_vm_readv", pid, address, size_bytes, done)
    return buffer.raw


def process_vm_write(pid: int, address: int, data: bytes | bytearray | memoryview) -> None:
    """Raises: KernelError: EFAULT, not all of it is mapped and writable. TaskGoneError."""
    base, size, owner = _pinned(data)
    local = IoVector(base, size)
    remote = IoVector(address, size)
    done = _writev(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if done != size:
        _raise("process_vm_writev", pid, address, size, done)
    del owner


def process_vm_writev(pid: int, runs: Sequence[tuple[int, int]], data: bytes | bytearray | memoryview) -> None:
    """Scatter one buffer over `runs` of (address, size in bytes), in their order.

    Raises: KernelError: EFAULT with the run that failed, or EINVAL when the sizes do not add up. TaskGoneError.
    """
    base, size, owner = _pinned(data)
    if sum(length for _, length in runs) != size:
        raise ValueError(f"runs of {sum(length for _, length in runs)} bytes for a buffer of {size}")
    for first in range(0, len(runs), IOV_MAX):
        part = runs[first : first + IOV_MAX]
        remote = (IoVector * len(part))(*[IoVector(address, length) for address, length in part])
        wanted = sum(length for _, length in part)
        local = IoVector(base, wanted)
        done = _writev(pid, ctypes.byref(local), 1, ctypes.byref(remote), len(part), 0)
        if done != wanted:
            address, length = _run_at(part, max(done, 0))
            _raise("process_vm_writev", pid, address, length, min(done, 0))
        base += wanted
    del owner


def _run_at(runs: Sequence[tuple[int, int]], offset: int) -> tuple[int, int]:
    for address, length in runs:
        if offset < length:
            return address + offset, length - offset
        offset -= length
    return runs[-1]


def _raise(call: str, pid: int, address: int, size_bytes: int, done: int) -> None:
    number = get_errno() if done < 0 else errno.EFAULT  # a short transfer ended at what is not there
    if done > 0:
        address, size_bytes = address + done, size_bytes - done
    raise failure(f"{call}(pid {pid}, {address:#x}, {size_bytes} bytes)", number)


def open_mem(pid: int, *, writable: bool = False) -> Fd:
    """/proc/PID/mem: stays with the address space it was opened on, also when the pid is recycled.

    Raises: KernelError, TaskGoneError.
    """
    path = f"/proc/{pid}/mem"
    try:
        return Fd(os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC))
    except FileNotFoundError as error:
        raise failure(f"open({path})", errno.ESRCH) from error
    except OSError as error:
        raise os_failure(f"open({path})", error) from error


def pread_mem(mem: Fd, address: int, size_bytes: int) -> bytes:
    """Read all of a range through /proc/PID/mem, whatever its protection.

    Raises: KernelError: EIO at a hole or a guard page. TaskGoneError: the address space is gone (nothing to read).
    """
    call = f"pread(/proc/PID/mem, {address:#x}, {size_bytes} bytes)"
    try:
        data = os.pread(mem, size_bytes, address)
    except OSError as error:
        raise os_failure(call, error) from error
    if not data and size_bytes:
        raise failure(call, errno.ESRCH, "the address space is gone")
    if len(data) != size_bytes:
        raise failure(call, errno.EIO, f"only {len(data)} bytes can be read")
    return data
