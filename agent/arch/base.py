"""What differs between machines, behind one interface. Nothing outside agent.arch knows a register's name."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from agent.kernel.unistd import SyscallNumbers

BATCH_ROW_BYTES = 64  # eight words: number, six arguments, result
BATCH_RESULT_WORD = 7


class Interruption(enum.Enum):
    """What a thread was doing when it was stopped, and so what its registers need to go on by themselves."""

    NONE = "none"  # in its own code, or after a call that was done
    RESTART = "restart"  # the call starts over
    REMAINDER = "remainder"  # a sleep starts over with the time that was left
    HIDDEN_EINTR = "hidden-eintr"  # our stop made it fail with EINTR; it starts over


class Registers(Protocol):
    """The general registers of a thread, as NT_PRSTATUS gives them."""

    def copy(self) -> Any: ...

    def pack(self) -> bytes:
        """The kernel's own layout, for the wire and for another `registers_from`."""
        ...

    @property
    def program_counter(self) -> int: ...

    @property
    def stack_pointer(self) -> int: ...


R = TypeVar("R", bound=Registers)


class Architecture(Protocol[R]):
    """`R` is the machine's own register type; none of these functions changes its argument."""

    name: str
    audit: int  # AUDIT_ARCH_*, linux/audit.h
    page_bytes: int
    sys: SyscallNumbers
    syscall_instruction: bytes
    batch_code: bytes  # position independent; ends at a breakpoint
    general_note: int  # NT_PRSTATUS
    extended_note: int  # the register set with vector and floating point state

    def new_registers(self) -> R:
        """All zero: what ptrace fills."""
        ...

    def registers_from(self, data: bytes) -> R: ...

    def prepare_syscall(self, regs: R, program_counter: int, number: int, arguments: Sequence[int]) -> R:
        """Registers that make the call at `program_counter`, where a syscall instruction stands."""
        ...

    def jump(self, regs: R, program_counter: int) -> R:
        """The same registers with another address to go on at."""
        ...

    def result(self, regs: R) -> int:
        """Of a call that has returned: signed, -errno on failure."""
        ...

    def prepare_batch(
        self, regs: R, *, code: int, table: int, count: int, keep_going: bool, stack: int
    ) -> R:  # fmt: skip
        """Registers that run `count` rows of `table` by the batch code at `code`, a new stack at `stack`."""
        ...

    def batch_rows_left(self, regs: R) -> int:
        """At the batch's breakpoint: rows that were not done; the first of them is the one that failed."""
        ...

    def is_at_batch_end(self, regs: R, code: int) -> bool: ...

    def fix_interrupted_syscall(self, regs: R, *, has_pending_signal: bool) -> tuple[R, Interruption]:
        """Registers with which a thread goes on rightly on another kernel, which knows nothing of its call."""
        ...

    def hide_interruption(self, regs: R, *, has_pending_signal: bool) -> tuple[R, Interruption]:
        """Registers with which a thread goes on rightly on its own kernel, which restarts what it can by itself."""
        ...
