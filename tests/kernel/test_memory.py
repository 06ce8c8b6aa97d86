from __future__ import annotations

import errno
import os

import pytest

from agent.kernel import memory
from protocol.errors import KernelError, TaskGoneError
from tests.kernel.programs import puppet

MAP = "m = mmap.mmap(-1, 16 << 20, flags=34); base = answer = ctypes.addressof(ctypes.c_char.from_buffer(m))"


def test_memory_of_another_process_is_read_and_written() -> None:
    with puppet() as it:
        base = int(str(it.do(MAP)))
        memory.process_vm_write(it.pid, base + 5, b"hello")
        assert it.do("answer = bytes(m[:16])") == b"\0\0\0\0\0hello" + bytes(6)
        assert memory.process_vm_read(it.pid, base + 5, 5) == b"hello"
        mem = memory.open_mem(it.pid)
        assert memory.pread_mem(mem, base + 4, 7) == b"\0hello\0"
        with pytest.raises(KernelError) as caught:
            memory.pread_mem(mem, 4096, 1)
        assert caught.value.errno == errno.EIO
        os.close(mem)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_more_runs_than_one_call_takes_are_scattered(kind: type) -> None:
    with puppet() as it:
        base = int(str(it.do(MAP)))
        runs = [(base + 8192 * i, 3) for i in range(1500)]
        data = b"".join(b"%03d" % (i % 1000) for i in range(1500))
        memory.process_vm_writev(it.pid, runs, kind(data))
        assert it.do("answer = b''.join(m[8192 * i : 8192 * i + 3] for i in range(1500))") == data


def test_a_write_to_a_hole_names_the_address() -> None:
    with puppet() as it:
        base = int(str(it.do(MAP)))
        with pytest.raises(KernelError, match=r"0x1000, 2 bytes\).*Bad address") as caught:
            memory.process_vm_writev(it.pid, [(base, 2), (0x1000, 2)], b"abcd")
        assert caught.value.errno == errno.EFAULT
        with pytest.raises(ValueError, match="runs of 1 bytes"):
            memory.process_vm_writev(it.pid, [(base, 1)], b"abcd")


def test_a_dead_process_s_memory_is_gone() -> None:
    with puppet() as it:
        mem = memory.open_mem(it.pid)
    with pytest.raises(TaskGoneError):
        memory.process_vm_read(it.pid, 0x1000, 1)
    with pytest.raises(TaskGoneError):
        memory.pread_mem(mem, 0x400000, 1)
    os.close(mem)
