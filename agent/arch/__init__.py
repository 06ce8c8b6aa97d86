"""The machine that we run on, behind one interface (base.Architecture)."""

from __future__ import annotations

import functools
import platform
from typing import Any

from agent.arch.aarch64 import Aarch64
from agent.arch.base import Architecture, Interruption
from agent.arch.x86_64 import X86_64
from agent.kernel.unistd import SYS, SyscallNumbers
from protocol.errors import UnsupportedError

__all__ = ["SYS", "Architecture", "Interruption", "SyscallNumbers", "current"]


@functools.cache
def current() -> Architecture[Any]:
    """Raises: UnsupportedError: a machine that is not known here, or a Python built for another one."""
    machine = platform.machine()
    known: dict[str, Architecture[Any]] = {"x86_64": X86_64(), "aarch64": Aarch64()}
    if machine not in known:
        raise UnsupportedError(f"machine {machine} is not supported; {' and '.join(known)} are")
    if known[machine].sys is not SYS:
        raise UnsupportedError(f"this Python is not built for {machine}")
    return known[machine]
