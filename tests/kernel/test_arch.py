"""What the machine layer computes, without any process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from agent.arch import current
from agent.arch.aarch64 import Aarch64
from agent.arch.base import Interruption
from agent.arch.x86_64 import BATCH_CODE, BATCH_SOURCE, X86_64, Registers, signed
from agent.kernel.unistd import SYS
from protocol.errors import UnsupportedError

ARCH = X86_64()
IN_NO_CALL = (1 << 64) - 1


def interrupted(number: int, result: int, **registers: int) -> Registers:
    regs = Registers()
    regs.orig_rax, regs.rax, regs.rip = number, result, 0x1002
    for name, value in registers.items():
        setattr(regs, name, value)
    return regs


def test_the_batch_code_is_what_the_assembler_makes(tmp_path: Path) -> None:
    subprocess.run(["as", "-o", tmp_path / "o", "-"], input=BATCH_SOURCE, text=True, check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "o", tmp_path / "bin"], check=True)
    assert (tmp_path / "bin").read_bytes() == BATCH_CODE


def test_the_machine_is_known() -> None:
    assert current().sys is SYS


@pytest.mark.parametrize("error", [512, 513, 514])
def test_a_restartable_call_starts_over(error: int) -> None:
    regs, kind = ARCH.fix_interrupted_syscall(interrupted(SYS.read, -error), has_pending_signal=True)
    assert kind is Interruption.RESTART
    assert (regs.rax, regs.rip, regs.orig_rax) == (SYS.read, 0x1000, IN_NO_CALL)


def test_a_sleep_goes_on_with_what_was_left() -> None:
    regs, kind = ARCH.fix_interrupted_syscall(
        interrupted(SYS.nanosleep, -516, rdi=0x10, rsi=0x20), has_pending_signal=False
    )  # fmt: skip
    assert (kind, regs.rdi) == (Interruption.REMAINDER, 0x20)
    regs, kind = ARCH.fix_interrupted_syscall(
        interrupted(SYS.clock_nanosleep, -516, rdx=0x10, r10=0x20), has_pending_signal=False
    )  # fmt: skip
    assert (kind, regs.rdx) == (Interruption.REMAINDER, 0x20)


def test_a_sleep_without_room_for_the_rest_starts_over() -> None:
    regs, kind = ARCH.fix_interrupted_syscall(
        interrupted(SYS.nanosleep, -516, rdi=0x10, rsi=0), has_pending_signal=False
    )  # fmt: skip
    assert (kind, regs.rdi, regs.rip) == (Interruption.RESTART, 0x10, 0x1000)


@pytest.mark.parametrize("number", [232, 281, 441, 220, 128, 208])
def test_an_eintr_that_our_stop_caused_is_hidden_unless_a_signal_waits(number: int) -> None:
    regs, kind = ARCH.hide_interruption(interrupted(number, -4), has_pending_signal=False)
    assert (kind, regs.rax, regs.rip) == (Interruption.HIDDEN_EINTR, number, 0x1000)
    regs, kind = ARCH.hide_interruption(interrupted(number, -4), has_pending_signal=True)
    assert (kind, signed(regs.rax), regs.rip) == (Interruption.NONE, -4, 0x1002)


def test_on_its_own_kernel_a_restartable_call_is_left_to_the_kernel() -> None:
    regs, kind = ARCH.hide_interruption(interrupted(SYS.read, -512), has_pending_signal=False)
    assert (kind, signed(regs.rax), regs.orig_rax) == (Interruption.NONE, -512, SYS.read)


def test_an_eintr_of_the_program_s_own_is_kept() -> None:
    regs, kind = ARCH.fix_interrupted_syscall(interrupted(SYS.read, -4), has_pending_signal=False)
    assert (kind, signed(regs.rax)) == (Interruption.NONE, -4)


def test_a_thread_in_its_own_code_is_left_alone() -> None:
    regs, kind = ARCH.fix_interrupted_syscall(interrupted(IN_NO_CALL, -512), has_pending_signal=False)
    assert (kind, signed(regs.rax), regs.rip) == (Interruption.NONE, -512, 0x1002)


def test_borrowed_code_runs_without_trap_and_direction_flag() -> None:
    own = interrupted(IN_NO_CALL, 0, eflags=0x746)
    assert ARCH.prepare_syscall(own, 0x10, SYS.getpid, []).eflags == 0x246
    batch = ARCH.prepare_batch(own, code=1, table=2, count=3, keep_going=True, stack=4)
    assert (batch.eflags, batch.rip, batch.r15, batch.r14, batch.r13, batch.rsp) == (0x246, 1, 2, 3, 1, 4)
    assert own.eflags == 0x746


def test_registers_survive_packing() -> None:
    regs = interrupted(1, 2, r15=3, gs=4)
    assert ARCH.registers_from(regs.pack()).pack() == regs.pack()
    with pytest.raises(ValueError, match="no x86-64 register set"):
        ARCH.registers_from(b"short")


def test_aarch64_says_what_it_cannot_do() -> None:
    other = Aarch64()
    regs = other.prepare_syscall(other.new_registers(), 0x1000, 172, [7])
    assert (regs.pc, regs.regs[8], regs.regs[0]) == (0x1000, 172, 7)
    with pytest.raises(UnsupportedError, match="aarch64"):
        other.fix_interrupted_syscall(regs, has_pending_signal=False)
