"""Time namespaces: a container's CLOCK_MONOTONIC that goes on where the source's stood. Source: time_namespaces(7).

Only the monotonic clock is ever moved: runtimes compare start times of /proc, which follow the boottime clock.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.kernel.namespaces import Namespace, unshare
from agent.kernel.syscalls import failure, os_failure

NS_PER_S = 1_000_000_000
_OWN = "/proc/self/timens_offsets"


@dataclass(frozen=True, slots=True)
class ClockOffsets:
    """What a time namespace adds to the initial namespace's clocks."""

    monotonic_ns: int
    boottime_ns: int


def parse_offsets(text: str) -> ClockOffsets:
    offsets = {"monotonic": 0, "boottime": 0}
    for line in text.splitlines():
        clock, seconds, nanoseconds = line.split()
        offsets[clock] = int(seconds) * NS_PER_S + int(nanoseconds)
    return ClockOffsets(offsets["monotonic"], offsets["boottime"])


def own_offsets() -> ClockOffsets:
    """Of the namespace that this process's children are made in. Raises: KernelError: no CONFIG_TIME_NS."""
    return _read_offsets(_OWN)


def offsets_of(pid: int) -> ClockOffsets:
    """Of the namespace that children of `pid` are made in: its own, if it made no other.

    Raises: TaskGoneError. KernelError: no CONFIG_TIME_NS.
    """
    return _read_offsets(f"/proc/{pid}/timens_offsets")


def _read_offsets(path: str) -> ClockOffsets:
    try:
        return parse_offsets(Path(path).read_text(encoding="ascii"))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not Path(path).parent.exists():
            raise failure(f"read({path})", errno.ESRCH) from error
        raise os_failure(f"read({path})", error) from error


def enter_shifted_monotonic(offset_ns: int) -> None:
    """Make a time namespace for the children of this process, its monotonic clock `offset_ns` from ours.

    Offsets in the kernel count from the initial namespace, so ours are added. The boottime clock stays as it is.
    Raises: KernelError.
    """
    before = own_offsets()
    unshare(Namespace.TIME)
    lines = "".join(
        f"{clock} {total // NS_PER_S} {total % NS_PER_S}\n"
        for clock, total in (("monotonic", before.monotonic_ns + offset_ns), ("boottime", before.boottime_ns))
    )
    try:
        Path(_OWN).write_text(lines, encoding="ascii")
    except OSError as error:
        raise os_failure(f"write({_OWN}, {lines!r})", error) from error


def run_in_time_namespace(argv: Sequence[str], monotonic_offset_ns: int) -> list[str]:
    """The command line that runs `argv` with its monotonic clock `monotonic_offset_ns` from ours.

    The process that runs it ends with the status of `argv`. Without an offset it is `argv` itself.
    """
    if monotonic_offset_ns == 0:
        return list(argv)
    return [sys.executable, "-P", "-m", "agent.kernel.timens_exec", str(monotonic_offset_ns), "--", *argv]


def run(argv: Sequence[str], monotonic_offset_ns: int) -> int:
    """Run `argv` in its time namespace as a child, and give its exit status (128 + N for signal N)."""
    enter_shifted_monotonic(monotonic_offset_ns)
    child = os.fork()  # not posix_spawn: a child that shares our memory cannot be in another time namespace
    if child == 0:
        try:
            os.execvp(argv[0], list(argv))
        except OSError as error:
            os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
            os._exit(127)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code
