"""x86-64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

from agent.arch.base import Interruption
from agent.kernel.unistd import X86_64 as SYS

_WORD = (1 << 64) - 1
_NO_SYSCALL = _WORD  # orig_rax of a thread that is in no call

# linux/errno.h, kernel-internal: a call that was interrupted and may be made again.
ERESTARTSYS = 512
ERESTARTNOINTR = 513
ERESTARTNOHAND = 514
ERESTART_RESTARTBLOCK = 516
EINTR = 4
_RESTARTABLE = frozenset({ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND})

# asm/unistd_64.h: calls that fail with EINTR on any stop, handled signal or not, and are only on this machine.
_EPOLL_WAIT = 232
_FAIL_ON_ANY_STOP = frozenset(
    {_EPOLL_WAIT, SYS.epoll_pwait, SYS.epoll_pwait2, SYS.semtimedop, SYS.rt_sigtimedwait, SYS.io_getevents}
)
_SYSCALL_BYTES = 2
# asm/processor-flags.h: trap and direction; both would disturb borrowed code.
_X86_EFLAGS_TF = 0x100
_X86_EFLAGS_DF = 0x400

_NAMES = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss"
    " fs_base gs_base ds es fs gs"
)


def signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


class Registers(ctypes.Structure):
    """struct user_regs_struct (sys/user.h)"""

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int
    _fields_ = [(name, ctypes.c_uint64) for name in _NAMES.split()]

    def copy(self) -> Registers:
        return Registers.from_buffer_copy(self)

    def pack(self) -> bytes:
        return bytes(self)

    @property
    def program_counter(self) -> int:
        return self.rip

    @property
    def stack_pointer(self) -> int:
        return self.rsp


# next: mov  (%r15),%rax       49 8b 07
#       mov  8(%r15),%rdi      49 8b 7f 08
#       mov  16(%r15),%rsi     49 8b 77 10
#       mov  24(%r15),%rdx     49 8b 57 18
#       mov  32(%r15),%r10     4d 8b 57 20
#       mov  40(%r15),%r8      4d 8b 47 28
#       mov  48(%r15),%r9      4d 8b 4f 30
#       syscall                0f 05
#       mov  %rax,56(%r15)     49 89 47 38
#       cmp  $-4095,%rax       48 3d 01 f0 ff ff
#       jb   done              72 05
#       test %r13,%r13         4d 85 ed
#       jz   stop              74 09
# done: add  $64,%r15          49 83 c7 40
#       dec  %r14              49 ff ce
#       jnz  next              75 c9
# stop: int3                   cc
BATCH_SOURCE: Final = """
1: mov (%r15),%rax
 mov 8(%r15),%rdi
 mov 16(%r15),%rsi
 mov 24(%r15),%rdx
 mov 32(%r15),%r10
 mov 40(%r15),%r8
 mov 48(%r15),%r9
 syscall
 mov %rax,56(%r15)
 cmp $-4095,%rax
 jb 2f
 test %r13,%r13
 jz 3f
2: add $64,%r15
 dec %r14
 jnz 1b
3: int3
"""
BATCH_CODE: Final = bytes.fromhex(
    "498b07 498b7f08 498b7710 498b5718 4d8b5720 4d8b4728 4d8b4f30 0f05 49894738 483d01f0ffff 7205 4d85ed 7409"
    "4983c740 49ffce 75c9 cc"
)


class X86_64:  # noqa: N801 - the machine's name
    """The Architecture of x86-64."""

    name = "x86_64"
    audit = 0xC000003E
    page_bytes = 4096
    sys = SYS
    syscall_instruction = b"\x0f\x05"
    batch_code = BATCH_CODE
    general_note = 1  # elf.h, NT_PRSTATUS
    extended_note = 0x202  # elf.h, NT_X86_XSTATE

    def new_registers(self) -> Registers:
        return Registers()

    def registers_from(self, data: bytes) -> Registers:
        """Raises: ValueError: not the size of a register set."""
        if len(data) != ctypes.sizeof(Registers):
            raise ValueError(f"{len(data)} bytes are no x86-64 register set")
        return Registers.from_buffer_copy(data)

    def prepare_syscall(
        self, regs: Registers, program_counter: int, number: int, arguments: Sequence[int]
    ) -> Registers:  # fmt: skip
        new = regs.copy()
        new.rip = program_counter
        new.rax = number
        new.orig_rax = _NO_SYSCALL
        new.rdi, new.rsi, new.rdx, new.r10, new.r8, new.r9 = [*arguments, 0, 0, 0, 0, 0, 0][:6]
        new.eflags &= ~(_X86_EFLAGS_TF | _X86_EFLAGS_DF)
        return new

    def jump(self, regs: Registers, program_counter: int) -> Registers:
        new = regs.copy()
        new.rip = program_counter
        return new

    def result(self, regs: Registers) -> int:
        return signed(regs.rax)

    def prepare_batch(
        self, regs: Registers, *, code: int, table: int, count: int, keep_going: bool, stack: int
    ) -> Registers:  # fmt: skip
        new = regs.copy()
        new.rip = code
        new.r15 = table
        new.r14 = count
        new.r13 = int(keep_going)
        new.rsp = stack
        new.orig_rax = _NO_SYSCALL
        new.eflags &= ~(_X86_EFLAGS_TF | _X86_EFLAGS_DF)
        return new

    def batch_rows_left(self, regs: Registers) -> int:
        return regs.r14

    def is_at_batch_end(self, regs: Registers, code: int) -> bool:
        return regs.rip == code + len(BATCH_CODE)

    def fix_interrupted_syscall(
        self, regs: Registers, *, has_pending_signal: bool
    ) -> tuple[Registers, Interruption]:  # fmt: skip
        if signed(regs.orig_rax) < 0:
            return regs.copy(), Interruption.NONE
        error = -signed(regs.rax)
        if error in _RESTARTABLE:
            return _again(regs), Interruption.RESTART
        if error == ERESTART_RESTARTBLOCK:
            return _again_with_remainder(regs)
        return self.hide_interruption(regs, has_pending_signal=has_pending_signal)

    def hide_interruption(
        self, regs: Registers, *, has_pending_signal: bool
    ) -> tuple[Registers, Interruption]:  # fmt: skip
        is_ours = signed(regs.rax) == -EINTR and regs.orig_rax in _FAIL_ON_ANY_STOP
        if is_ours and not has_pending_signal:
            return _again(regs), Interruption.HIDDEN_EINTR
        new = regs.copy()
        if signed(regs.rax) not in {-e for e in (*_RESTARTABLE, ERESTART_RESTARTBLOCK)}:
            new.orig_rax = _NO_SYSCALL
        return new, Interruption.NONE


def _again(regs: Registers) -> Registers:
    new = regs.copy()
    new.rax = regs.orig_rax
    new.rip = regs.rip - _SYSCALL_BYTES
    new.orig_rax = _NO_SYSCALL
    return new


def _again_with_remainder(regs: Registers) -> tuple[Registers, Interruption]:
    """A relative sleep: the kernel has written what was left to the caller's `rem`, when there is one."""
    new = _again(regs)
    if regs.orig_rax == SYS.nanosleep and regs.rsi:
        new.rdi = regs.rsi
        return new, Interruption.REMAINDER
    if regs.orig_rax == SYS.clock_nanosleep and regs.r10:
        new.rdx = regs.r10
        return new, Interruption.REMAINDER
    return new, Interruption.RESTART
