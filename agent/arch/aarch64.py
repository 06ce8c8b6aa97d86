"""aarch64: numbers and register layout. What was not tried on such a machine says so when asked for."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import NoReturn

from agent.arch.base import Interruption
from agent.kernel.unistd import AARCH64 as SYS
from protocol.errors import UnsupportedError

_GENERAL_REGISTERS = 31


class Registers(ctypes.Structure):
    """struct user_pt_regs (asm/ptrace.h)"""

    regs: ctypes.Array[ctypes.c_uint64]
    sp: int
    pc: int
    pstate: int
    _fields_ = [
        ("regs", ctypes.c_uint64 * _GENERAL_REGISTERS),
        ("sp", ctypes.c_uint64),
        ("pc", ctypes.c_uint64),
        ("pstate", ctypes.c_uint64),
    ]

    def copy(self) -> Registers:
        return Registers.from_buffer_copy(self)

    def pack(self) -> bytes:
        return bytes(self)

    @property
    def program_counter(self) -> int:
        return self.pc

    @property
    def stack_pointer(self) -> int:
        return self.sp


def _not_done(what: str) -> NoReturn:
    raise UnsupportedError(f"aarch64: {what} is not done yet", hint="migrate between x86-64 hosts")


class Aarch64:
    """The Architecture of aarch64: single calls are prepared; batches and interrupted calls are refused."""

    name = "aarch64"
    audit = 0xC00000B7
    page_bytes = os.sysconf("SC_PAGE_SIZE")  # 4, 16 or 64 KiB
    sys = SYS
    syscall_instruction = b"\x01\x00\x00\xd4"  # svc #0
    batch_code = b""
    general_note = 1  # elf.h, NT_PRSTATUS
    extended_note = 2  # elf.h, NT_PRFPREG; SVE state is a note of its own

    def new_registers(self) -> Registers:
        return Registers()

    def registers_from(self, data: bytes) -> Registers:
        """Raises: ValueError: not the size of a register set."""
        if len(data) != ctypes.sizeof(Registers):
            raise ValueError(f"{len(data)} bytes are no aarch64 register set")
        return Registers.from_buffer_copy(data)

    def prepare_syscall(
        self, regs: Registers, program_counter: int, number: int, arguments: Sequence[int]
    ) -> Registers:  # fmt: skip
        new = regs.copy()
        new.pc = program_counter
        new.regs[8] = number
        for index, argument in enumerate([*arguments, 0, 0, 0, 0, 0, 0][:6]):
            new.regs[index] = argument
        return new

    def jump(self, regs: Registers, program_counter: int) -> Registers:
        new = regs.copy()
        new.pc = program_counter
        return new

    def result(self, regs: Registers) -> int:
        word = int(regs.regs[0])
        return word - (1 << 64) if word >> 63 else word

    def prepare_batch(
        self, regs: Registers, *, code: int, table: int, count: int, keep_going: bool, stack: int
    ) -> Registers:  # fmt: skip
        _not_done(f"a batch of {count} calls (rows at {table:#x}, {regs}, {code:#x}, {keep_going}, {stack:#x})")

    def batch_rows_left(self, regs: Registers) -> int:
        _not_done(f"a batch of calls ({regs})")

    def is_at_batch_end(self, regs: Registers, code: int) -> bool:
        _not_done(f"a batch of calls ({regs}, {code:#x})")

    def fix_interrupted_syscall(
        self, regs: Registers, *, has_pending_signal: bool
    ) -> tuple[Registers, Interruption]:  # fmt: skip
        _not_done(f"going on with an interrupted call ({regs}, pending signal {has_pending_signal})")

    def hide_interruption(
        self, regs: Registers, *, has_pending_signal: bool
    ) -> tuple[Registers, Interruption]:  # fmt: skip
        _not_done(f"going on with an interrupted call ({regs}, pending signal {has_pending_signal})")
