"""System calls made by a traced thread for us.

One call at a time goes through the syscall instruction of the vDSO and writes nothing into the process. Many go as a
table in a scratch mapping, which a loop of machine code works through: a thousand take about 2 ms.
"""

from __future__ import annotations

import errno
import os
import signal as signals
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from agent.arch import SYS, current
from agent.arch.base import BATCH_RESULT_WORD, BATCH_ROW_BYTES
from agent.engine.native.tracee import Tracee
from agent.kernel import memory, procfs, ptrace, waiting
from agent.kernel.procfs import MemoryArea
from agent.kernel.ptrace import NEW_TASK_EVENTS, Event, WaitStatus
from agent.kernel.types import Address, Tid
from protocol.errors import KernelError, TaskGoneError, UnsupportedError

# asm-generic/mman-common.h, linux/mman.h
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE = 0x02, 0x20, 0x100000

MAX_ERRNO = 4095
_WORD = (1 << 64) - 1
_WORDS = BATCH_ROW_BYTES // 8

SCRATCH_LOWEST = 0x100000  # above vm.mmap_min_addr, below where anything is placed by the kernel
SCRATCH_BYTES = 0x60000
_ALIGN_BYTES = 0x10000
_TABLE_ROWS = 2048
_STACK_BYTES = 0x1000
_SIGTRAP_BIT = 1 << (signals.SIGTRAP - 1)

DEFAULT_CALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Scratch:
    """A mapping of ours in the process: one page of code (r-x), then table, data and stack (rw-)."""

    start: int
    size_bytes: int

    @property
    def end(self) -> int:
        return self.start + self.size_bytes


def find_hole(size_bytes: int, avoid: Iterable[Sequence[MemoryArea]], lowest: int = SCRATCH_LOWEST) -> int:
    """The lowest address from `lowest` with `size_bytes` free in all of the given address spaces."""
    taken = sorted((area.start, area.end) for areas in avoid for area in areas)
    candidate = lowest
    for start, end in taken:
        if start >= candidate + size_bytes:
            break
        if end > candidate:
            candidate = (end + _ALIGN_BYTES - 1) & ~(_ALIGN_BYTES - 1)
    return candidate


class RemoteSyscalls:
    """Calls made by `tracee`, which must stand at a stop. Its registers are borrowed until `tracee.restore()`.

    As a context manager it unmaps its scratch and gives the registers back at the end.
    """

    def __init__(
        self,
        tracee: Tracee,
        *,
        syscall_address: int | None = None,
        timeout_s: float = DEFAULT_CALL_TIMEOUT_S,
    ) -> None:
        self.tracee = tracee
        self.timeout_s = timeout_s
        self.scratch: Scratch | None = None
        self.new_tids: list[Tid] = []  # of clone, fork and vfork, in the order they were made; they are traced by us
        self._syscall_address = syscall_address
        self._owns_scratch = False
        self._table = self._table_rows = self._data = self._data_next = self._data_end = self._stack = 0
        self._started: Sequence[Sequence[int]] = ()
        self._keep_going = False
        self._ignores_trap = False
        tracee.save()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        try:
            if self._owns_scratch:
                self.unmap_scratch()
            self.tracee.restore()
        except TaskGoneError:
            # A dead thread needs no registers; what killed it is the error that matters.
            if error is None:
                raise

    # ---------------------------------------------------------------- one call

    @property
    def syscall_address(self) -> Address:
        """Where the vDSO has a syscall instruction. Set it after the vDSO was moved."""
        if self._syscall_address is None:
            self._syscall_address = find_syscall_instruction(self.tracee.tid)
        return Address(self._syscall_address)

    @syscall_address.setter
    def syscall_address(self, address: int) -> None:
        self._syscall_address = address

    def call(self, number: int, *arguments: int) -> int:
        """Make one call and give its result.

        Raises: KernelError: the call failed (named with its arguments), or a signal struck. TaskGoneError.
        """
        result = self.try_call(number, *arguments)
        if -MAX_ERRNO <= result < 0:
            raise self._error(number, arguments, -result)
        return result

    def try_call(self, number: int, *arguments: int) -> int:
        """The same, giving -errno for a failed call."""
        arch, tracee = current(), self.tracee
        tracee.set_registers(arch.prepare_syscall(tracee.saved, self.syscall_address, number, arguments))
        has_execed = self._run_to_syscall_stop(number)
        has_execed |= self._run_to_syscall_stop(number)
        regs = tracee.get_registers()
        if has_execed:
            # Another program: its own registers, another vDSO, no scratch. The signal mask lives on.
            tracee.saved, self._syscall_address, self.scratch = regs, None, None
            self._owns_scratch = False
        return arch.result(regs)

    def _run_to_syscall_stop(self, number: int) -> bool:
        """Gives whether an exec came on the way."""
        has_execed = False
        ptrace.syscall_stop(self.tracee.tid)
        while True:
            status = waiting.wait_for(self.tracee.tid, self.timeout_s)
            if status.is_syscall_stop:
                return has_execed
            self._pass(status, SYS.name_of(number))
            has_execed |= status.event == Event.EXEC
            ptrace.syscall_stop(self.tracee.tid)

    def _pass(self, status: WaitStatus, doing: str) -> None:
        """Take note of a stop that is not the one we wait for. Raises when the thread cannot go on."""
        if status.is_gone:
            raise TaskGoneError(f"thread {self.tracee.tid} ended in an injected {doing}")
        if status.event in NEW_TASK_EVENTS:
            self.new_tids.append(Tid(ptrace.get_event_message(self.tracee.tid)))
        elif status.is_signal_stop:
            if status.signal == signals.SIGSTOP:  # it cannot be blocked
                self.tracee.held_stop = True
                return
            where = self.tracee.get_registers().program_counter
            raise KernelError(
                f"injected {doing}, thread {self.tracee.tid}",
                errno.EFAULT,
                f"signal {status.signal} at {where:#x}",
            )

    def _error(self, number: int, arguments: Sequence[int], code: int, index: int | None = None) -> KernelError:
        shown = ", ".join(hex(a & _WORD) if abs(a) > 4096 else str(a) for a in arguments)
        place = f"thread {self.tracee.tid}" if index is None else f"thread {self.tracee.tid}, call {index} of a batch"
        return KernelError(f"injected {SYS.name_of(number)}({shown}), {place}", code, os.strerror(code))

    # ---------------------------------------------------------------- scratch

    def map_scratch(
        self,
        avoid: Iterable[Sequence[MemoryArea]] = (),
        size_bytes: int = SCRATCH_BYTES,
        *,
        here: Sequence[MemoryArea] | None = None,
    ) -> None:
        """Map code, table and data where they are in nobody's way: a hole of this address space and of all of `avoid`.

        The code page is never writable and executable at once. `here`: the areas of this address space, if they are
        known already.
        Raises: KernelError.
        """
        arch, tid = current(), self.tracee.tid
        start = find_hole(size_bytes, [procfs.read_maps(tid) if here is None else here, *avoid])
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        self.call(SYS.mmap, start, size_bytes, PROT_READ | PROT_WRITE, flags, -1, 0)
        self.scratch = Scratch(start, size_bytes)
        self._owns_scratch = True
        memory.process_vm_write(tid, start, arch.batch_code)
        self.call(SYS.mprotect, start, arch.page_bytes, PROT_READ | PROT_EXEC)
        # A batch ends with a breakpoint, which resets an ignored SIGTRAP to its default.
        self._ignores_trap = bool(procfs.read_status(self.tracee.pid, tid).sig_ignored & _SIGTRAP_BIT)
        self._table = start + arch.page_bytes
        self._table_rows = _TABLE_ROWS
        self._data = self._data_next = self._table + _TABLE_ROWS * BATCH_ROW_BYTES
        self._stack = start + size_bytes
        self._data_end = self._stack - _STACK_BYTES

    def share_scratch(self, tracee: Tracee, *, rows: int = 32, data_bytes: int = 1024) -> RemoteSyscalls:
        """Calls by another thread of the same process, in a part of this scratch of its own: both can run at once.

        The part is taken from the end of the data for as long as the scratch stands.
        Raises: MemoryError: no room is left; map a larger scratch.
        """
        assert self.scratch is not None, "map_scratch first"
        size = rows * BATCH_ROW_BYTES + ((data_bytes + 63) & ~63)
        if self._data_end - size < self._data_next:
            raise MemoryError(f"{size} bytes for thread {tracee.tid}: the scratch has no room left")
        self._data_end -= size
        other = RemoteSyscalls(tracee, syscall_address=self.syscall_address, timeout_s=self.timeout_s)
        other.scratch = self.scratch
        other._ignores_trap = self._ignores_trap
        other._table, other._table_rows = self._data_end, rows
        other._data = other._data_next = other._table + rows * BATCH_ROW_BYTES
        other._data_end = self._data_end + size
        other._stack = self._stack
        return other

    def unmap_scratch(self) -> None:
        """Through the vDSO's instruction, so that it can take away the code page too. Raises: KernelError."""
        if self.scratch is not None:
            self.call(SYS.munmap, self.scratch.start, self.scratch.size_bytes)
            self.scratch = None
            self._owns_scratch = False

    def place(self, data: bytes) -> Address:
        """Put `data` into the scratch and give its address, 16-byte aligned; there until `reset`.

        Raises: MemoryError: the scratch is full. KernelError.
        """
        address = self.reserve(len(data))
        if data:
            memory.process_vm_write(self.tracee.tid, address, data)
        return address

    def reserve(self, size_bytes: int) -> Address:
        """Room for what a call writes; its former content stays. Raises: MemoryError: the scratch is full."""
        assert self.scratch is not None, "map_scratch first"
        address = self._data_next
        after = address + ((size_bytes + 15) & ~15)
        if after > self._data_end:
            raise MemoryError(f"{size_bytes} bytes do not fit into the scratch ({self._data_end - address} are left)")
        self._data_next = after
        return Address(address)

    def reset(self) -> None:
        """Forget all that was placed."""
        self._data_next = self._data

    @property
    def stack_top(self) -> Address:
        """For a clone child that needs a stack for the moment until its registers are set."""
        return Address(self._stack - 64)

    def read(self, address: int, size_bytes: int) -> bytes:
        return memory.process_vm_read(self.tracee.tid, address, size_bytes)

    def write(self, address: int, data: bytes) -> None:
        memory.process_vm_write(self.tracee.tid, address, data)

    # ---------------------------------------------------------------- many calls

    def batch(self, calls: Sequence[Sequence[int]], keep_going: bool = False) -> list[int]:
        """Make all `calls` (number, up to six arguments), in order, and give their results, signed.

        With `keep_going` a failed call gives -errno and the rest are made all the same.
        Raises: KernelError: the first call that failed, by its index and name.
        """
        results: list[int] = []
        for first in range(0, len(calls), self._table_rows):
            self.start_batch(calls[first : first + self._table_rows], keep_going=keep_going)
            results += self.finish_batch(first)
        return results

    def start_batch(self, calls: Sequence[Sequence[int]], *, keep_going: bool = False) -> None:
        """Set the thread going on at most a table full of calls; `finish_batch` waits for it.

        Raises: ValueError: more than the table holds.
        """
        assert self.scratch is not None, "map_scratch first"
        if len(calls) > self._table_rows:
            raise ValueError(f"{len(calls)} calls; the table holds {self._table_rows}")
        self._started, self._keep_going = calls, keep_going
        if not calls:
            return
        words = [argument & _WORD for call in calls for argument in (*call, 0, 0, 0, 0, 0, 0, 0)[:_WORDS]]
        tracee = self.tracee
        memory.process_vm_write(tracee.tid, self._table, struct.pack(f"={len(words)}Q", *words))
        regs = current().prepare_batch(
            tracee.saved,
            code=self.scratch.start,
            table=self._table,
            count=len(calls),
            keep_going=keep_going,
            stack=self._stack - 64,
        )
        tracee.set_registers(regs)
        ptrace.cont(tracee.tid)

    def finish_batch(self, first_index: int = 0) -> list[int]:
        """Wait for `start_batch`'s calls; as `batch`. `first_index`: what the first call is named in an error."""
        calls, self._started = self._started, ()
        if not calls:
            return []
        assert self.scratch is not None, "start_batch first"
        arch, tracee = current(), self.tracee
        while True:
            status = waiting.wait_for(tracee.tid, self.timeout_s)
            if status.is_signal_stop and status.signal == signals.SIGTRAP:
                regs = tracee.get_registers()
                if arch.is_at_batch_end(regs, self.scratch.start):
                    break
            self._pass(status, f"batch of {len(calls)} calls")
            ptrace.cont(tracee.tid)
        done = len(calls) - arch.batch_rows_left(regs)
        raw = memory.process_vm_read(tracee.tid, self._table, len(calls) * BATCH_ROW_BYTES)
        results = list(struct.unpack(f"={_WORDS * len(calls)}q", raw)[BATCH_RESULT_WORD::_WORDS])
        if self._ignores_trap:
            self._ignore_trap()
        if done < len(calls):
            raise self._error(calls[done][0], calls[done][1:], -results[done], first_index + done)
        return results

    def _ignore_trap(self) -> None:
        # struct kernel_sigaction {handler SIG_IGN 1, flags, restorer, mask}
        address = self._stack - _STACK_BYTES
        memory.process_vm_write(self.tracee.tid, address, struct.pack("=4Q", 1, 0, 0, 0))
        self.call(SYS.rt_sigaction, signals.SIGTRAP, address, 0, 8)


def find_syscall_instruction(tid: int, areas: Sequence[MemoryArea] | None = None) -> Address:
    """Its address in the vDSO of `tid`.

    Raises: UnsupportedError: the process has no vDSO, or one without system calls. TaskGoneError.
    """
    if areas is None:
        areas = procfs.read_maps(tid)
    if not areas:
        raise TaskGoneError(f"process {tid} has ended: it has no memory any more")
    vdso = next((area for area in areas if area.path == "[vdso]"), None)
    if vdso is None:
        raise UnsupportedError(f"process {tid} has no vDSO, through which calls are made in it")
    offset = memory.process_vm_read(tid, vdso.start, vdso.size_bytes).find(current().syscall_instruction)
    if offset < 0:
        raise UnsupportedError(f"the vDSO of process {tid} makes no system call (a 32-bit program?)")
    return Address(vdso.start + offset)
