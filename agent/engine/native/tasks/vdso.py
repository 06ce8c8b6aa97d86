"""The vDSO: code of the kernel in each process, called to read clocks.

Survives: its address, so that the pointers to it in the process's memory stay right.
Does not survive: a kernel whose vDSO differs (refused: its functions would be elsewhere).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated

import msgspec
import xxhash

from agent.engine.native.tasks.memory import Address
from agent.engine.native.tasks.plan import CallPlan
from agent.kernel.memory import open_mem, pread_mem
from agent.kernel.procfs import MemoryArea
from agent.kernel.unistd import SYS
from protocol.errors import UnsupportedError
from protocol.messages import Record

NAMES = ("[vvar]", "[vvar_vclock]", "[vdso]")
_CODE = "[vdso]"
# The kernel's areas are some ten pages.
_MAX_BYTES = 1 << 20
# asm-generic/mman.h
_MREMAP_MAYMOVE = 1
_MREMAP_FIXED = 2


class VdsoPart(Record, frozen=True, kw_only=True):
    name: str
    offset: Annotated[int, msgspec.Meta(ge=0, le=_MAX_BYTES)]  # from the lowest part
    size_bytes: Annotated[int, msgspec.Meta(gt=0, le=_MAX_BYTES)]


class Vdso(Record, frozen=True, kw_only=True):
    """Where the kernel's areas lie in a process, and what the code is."""

    start: Address  # of the lowest part
    parts: list[VdsoPart]
    digest: str

    @property
    def size_bytes(self) -> int:
        """From the lowest part to the end of the highest."""
        return max((part.offset + part.size_bytes for part in self.parts), default=0)


def find(pid: int, lines: Iterable[MemoryArea]) -> Vdso:
    """Of a process of this host. `parts` is empty when it has none. Raises: TaskGoneError."""
    found = sorted((line for line in lines if line.path in NAMES), key=lambda line: line.start)
    if not found:
        return Vdso(start=0, parts=[], digest="")
    start = found[0].start
    digest = ""
    for line in found:
        if line.path == _CODE:
            mem = open_mem(pid)
            try:
                digest = xxhash.xxh3_128_hexdigest(pread_mem(mem, line.start, line.size_bytes))
            finally:
                os.close(mem)
    parts = [VdsoPart(name=line.path, offset=line.start - start, size_bytes=line.size_bytes) for line in found]
    return Vdso(start=start, parts=parts, digest=digest)


def check_same(source: Vdso, target: Vdso) -> None:
    """Raises: UnsupportedError: the two kernels' vDSOs differ."""
    if (source.digest, source.parts) != (target.digest, target.parts):
        raise UnsupportedError(
            f"the kernels' vDSOs differ ({source.digest[:12]} against {target.digest[:12]}): calls into it would "
            "go wrong",
            code="vdso-differs", hint="both hosts must run the same kernel build",
        )  # fmt: skip


def move(vdso: Vdso, start: int, plan: CallPlan) -> None:
    """Plan the move of all parts to `start`, each by itself: one mremap over several areas is refused."""
    for part in vdso.parts:
        plan.must(
            f"mremap({part.name})", SYS.mremap, vdso.start + part.offset, part.size_bytes, part.size_bytes,
            _MREMAP_MAYMOVE | _MREMAP_FIXED, start + part.offset,
        )  # fmt: skip
