"""System calls planned for one thread before they run, with the memory they read and write.

On the source each resource's `dump` adds its questions to a plan and gives a function that reads the answers; on the
target each `restore` adds its calls. One plan is one batch, so a thread is woken once, and the batches of all threads
run at the same time.
"""

from __future__ import annotations

import errno as errnos
import os
from collections.abc import Callable
from typing import TypeVar

from protocol.errors import KernelError

T = TypeVar("T")
# What a dump gives: reads the answers once the plan has run.
Later = Callable[[], T]

_ALIGNMENT = 16
_MAX_ERRNO = 4095
_SMALL = 4096


class Answer:
    """The result of one planned call."""

    __slots__ = ("_call", "_result")

    def __init__(self, call: str) -> None:
        self._call = call
        self._result: int | None = None

    def give(self, result: int) -> None:
        """What the kernel returned."""
        self._result = result

    @property
    def errno(self) -> int:
        """0, or the error number."""
        assert self._result is not None, "asked before the plan has run"
        return -self._result if -_MAX_ERRNO <= self._result < 0 else 0

    @property
    def value(self) -> int:
        """The result. Raises: KernelError: the call failed."""
        if self.errno:
            raise KernelError(self._call, self.errno, os.strerror(self.errno))
        assert self._result is not None
        return self._result

    def check(self, *allowed: int) -> None:
        """Raises: KernelError: it failed with an error that is not allowed."""
        if self.errno not in allowed:
            _ = self.value

    def __repr__(self) -> str:
        if self._result is None:
            return f"{self._call}: not run"
        return f"{self._call}: {errnos.errorcode.get(self.errno, self._result)}"


class CallPlan:
    """Calls of one thread and an arena of its scratch memory, from `base` on, for what they point to."""

    def __init__(self, base: int, size_bytes: int) -> None:
        self.base = base
        self.size_bytes = size_bytes
        self.calls: list[tuple[int, ...]] = []
        self._answers: list[tuple[Answer, bool, tuple[int, ...]]] = []
        self._memory = bytearray()
        self.has_placed = False

    def __len__(self) -> int:
        return len(self.calls)

    @property
    def memory(self) -> bytes:
        """What is to be in the arena before the calls run; after `keep`, what they left there."""
        return bytes(self._memory)

    def place(self, data: bytes) -> int:
        """Bytes that a call reads; gives their address."""
        address = self.reserve(len(data))
        offset = address - self.base
        self._memory[offset : offset + len(data)] = data
        self.has_placed = True
        return address

    def reserve(self, size_bytes: int) -> int:
        """Room that a call writes; gives its address. Raises: MemoryError: the arena is full."""
        start = -(-len(self._memory) // _ALIGNMENT) * _ALIGNMENT
        if start + size_bytes > self.size_bytes:
            raise MemoryError(f"a plan of {start + size_bytes} bytes in an arena of {self.size_bytes}")
        self._memory.extend(bytes(start + size_bytes - len(self._memory)))
        return self.base + start

    def read(self, address: int, size_bytes: int) -> bytes:
        """What the calls left at `address` of the arena; legal once the plan has run."""
        offset = address - self.base
        return bytes(self._memory[offset : offset + size_bytes])

    def call(self, name: str, number: int, *arguments: int) -> Answer:
        """One call whose result is looked at by whoever planned it."""
        return self._add(name, number, arguments, must=False)

    def must(self, name: str, number: int, *arguments: int) -> Answer:
        """One call whose failure fails the plan."""
        return self._add(name, number, arguments, must=True)

    def _add(self, name: str, number: int, arguments: tuple[int, ...], *, must: bool) -> Answer:
        answer = Answer(name)
        self.calls.append((number, *arguments))
        self._answers.append((answer, must, arguments))
        return answer

    def keep(self, results: list[int], memory: bytes) -> None:
        """The plan has run: these are the results, and what the arena holds now."""
        self._memory[:] = memory
        for (answer, _, _), result in zip(self._answers, results, strict=True):
            answer.give(result)

    def load(self, results: list[int], memory: bytes) -> None:
        """As `keep`. Raises: KernelError: a call that must succeed failed."""
        self.keep(results, memory)
        self.check_all()

    def check_all(self) -> None:
        """Raises: KernelError: a call that must succeed failed."""
        for answer, must, arguments in self._answers:
            if must and answer.errno:
                shown = ", ".join(hex(argument) if abs(argument) > _SMALL else str(argument) for argument in arguments)
                raise KernelError(
                    f"{answer!r} in the container, arguments ({shown})", answer.errno, os.strerror(answer.errno)
                )
