"""What one engine says to the other: typed records in SECTION frames, applied in the order they were sent.

Before the freeze: Begin, then as often as there are rounds Layout, Protect, Holes; then Threads and again Protect.
In the freeze: Layout and Protect if they changed, State, Files, Complete. Pages travel beside them, by the streams,
and keep their place among the sections.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from agent.engine.native.files.section import FilesSection
from agent.engine.native.tasks.credentials import Credentials, Seccomp
from agent.engine.native.tasks.memory import Address, Area
from agent.engine.native.tasks.process import ProcessAttributes
from agent.engine.native.tasks.registers import Registers
from agent.engine.native.tasks.rseq import Rseq
from agent.engine.native.tasks.scheduling import Scheduling
from agent.engine.native.tasks.signals import PendingSignals, SignalActions
from agent.engine.native.tasks.threads import ThreadAttributes
from agent.engine.native.tasks.timers import IntervalTimers
from agent.engine.native.tasks.vdso import Vdso
from protocol import codec
from protocol.messages import Message, Record

VERSION = 1
TaskNumber = Annotated[int, msgspec.Meta(ge=0, le=1 << 22)]
# The largest pid of Linux is 2**22.
ContainerId = Annotated[int, msgspec.Meta(ge=1, le=1 << 22)]
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 56)]


class BeginSection(Message, frozen=True, kw_only=True):
    """First: what kind of process comes, so that a target that cannot take it says so before any page."""

    version: int
    task: TaskNumber
    architecture: str
    exe: str  # inside the container
    vdso: Vdso
    seccomp: Seccomp


class LayoutSection(Message, frozen=True, kw_only=True):
    """All areas of a task, ascending. What is new is mapped with `Area.filling_prot`, what is gone unmapped."""

    task: TaskNumber
    areas: list[Area]


class ProtectSection(Message, frozen=True, kw_only=True):
    """Give ranges a protection: writable for pages that come, or the final one."""

    task: TaskNumber
    starts: list[Address]
    sizes: list[Size]
    prots: list[int]


class HolesSection(Message, frozen=True, kw_only=True):
    """Pages that the source has given back: drop them."""

    task: TaskNumber
    starts: list[Address]
    sizes: list[Size]


class ThreadsSection(Message, frozen=True, kw_only=True):
    """Thread ids in the container, the leader first: make those that are missing, end those that are too many."""

    task: TaskNumber
    tids: list[ContainerId]
    in_freeze: bool = False


class ThreadState(Record, frozen=True, kw_only=True):
    tid: ContainerId
    registers: Registers
    attributes: ThreadAttributes
    credentials: Credentials
    rseq: Rseq
    pending: PendingSignals
    scheduling: Scheduling


class StateSection(Message, frozen=True, kw_only=True):
    """The frozen task but for its open files. The leader is the first thread."""

    task: TaskNumber
    attributes: ProcessAttributes
    actions: SignalActions
    timers: IntervalTimers
    threads: list[ThreadState]


class FilesStateSection(Message, frozen=True, kw_only=True):
    """The open files of a task."""

    task: TaskNumber
    files: FilesSection


class CompleteSection(Message, frozen=True, kw_only=True):
    """Everything is said: finish, freeze the cgroup, detach, answer."""


Section = (
    BeginSection | LayoutSection | ProtectSection | HolesSection | ThreadsSection | StateSection | FilesStateSection
    | CompleteSection
)  # fmt: skip


def encode(section: Section) -> bytes:
    """The payload of a SECTION frame."""
    return codec.encode(section)


def decode(payload: bytes) -> Section:
    """Raises: RemoteProtocolError: not a section of this version."""
    section: Section = codec.decode(payload, Section)
    return section
