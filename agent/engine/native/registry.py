"""All resources that the engine knows, in the order in which they are restored; the support matrix is made from it.

A new resource is one file with a docstring that says what survives, and one line here.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import cast

from agent.engine.native import tree
from agent.engine.native.container import namespaces, system_v_ipc, tmpfs
from agent.engine.native.files import registry as files
from agent.engine.native.tasks import (
    credentials,
    memory,
    process,
    registers,
    rseq,
    scheduling,
    signals,
    threads,
    timers,
    vdso,
)  # fmt: skip
from agent.kernel import procfs
from protocol.errors import TaskGoneError
from protocol.messages import Refusal


class Scope(enum.Enum):
    """How often a resource exists; also the order of restoring."""

    CONTAINER = "container"
    TASK = "task"
    OPEN_FILE = "open file"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckContext:
    """What a `check` may look at. Nothing is stopped for it."""

    pid: int  # host pid of the container's init
    container_pid: int
    storage: str
    tcp: str
    network: str


Check = Callable[[CheckContext], Sequence[Refusal]]


def _nothing(_context: CheckContext) -> Sequence[Refusal]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One kind of state."""

    scope: Scope
    module: ModuleType
    check: Check = _nothing

    @property
    def name(self) -> str:
        """As its file is called."""
        return self.module.__name__.rpartition(".")[2].replace("_", " ")

    def said(self, what: str) -> str:
        """The text behind 'Survives:' or 'Does not survive:' of the module's docstring."""
        _, _, rest = (self.module.__doc__ or "").partition(f"{what}:")
        text = rest.split("\n\n")[0].split("\nDoes not survive:" if what == "Survives" else "\nSurvives:")[0]
        return " ".join(text.split())


def _statuses(pid: int) -> list[bytes]:
    found = []
    for tid in procfs.task_ids(pid):
        try:
            found.append(procfs.read_proc(f"/proc/{pid}/task/{tid}/status"))
        except TaskGoneError:
            continue
    return found


RESOURCES: tuple[Resource, ...] = (
    Resource(scope=Scope.CONTAINER, module=namespaces, check=lambda c: namespaces.check(c.pid, c.container_pid)),
    Resource(scope=Scope.CONTAINER, module=tmpfs, check=lambda c: tmpfs.check(c.pid)),
    Resource(scope=Scope.CONTAINER, module=system_v_ipc, check=lambda c: system_v_ipc.check(c.pid)),
    Resource(scope=Scope.TASK, module=tree, check=lambda c: tree.check(c.pid)),
    Resource(scope=Scope.TASK, module=vdso),
    Resource(scope=Scope.TASK, module=memory, check=lambda c: memory.check(c.pid, c.container_pid, storage=c.storage)),
    Resource(scope=Scope.TASK, module=threads, check=lambda c: threads.check(_statuses(c.pid), c.container_pid)),
    Resource(scope=Scope.TASK, module=signals),
    Resource(scope=Scope.TASK, module=process, check=lambda c: process.check(c.pid, c.container_pid)),
    Resource(
        scope=Scope.TASK, module=credentials, check=lambda c: credentials.check(_statuses(c.pid), c.container_pid)
    ),
    Resource(scope=Scope.TASK, module=rseq),
    Resource(scope=Scope.TASK, module=timers, check=lambda c: timers.check(c.pid, c.container_pid)),
    # Checked all together, by files.check: one look at the table serves all kinds.
    *(
        Resource(scope=Scope.OPEN_FILE, module=cast("ModuleType", kind))
        for kind in (*files._KINDS, *files._SOCKET_KINDS)
    ),
    Resource(scope=Scope.TASK, module=scheduling),
    Resource(scope=Scope.TASK, module=registers),
)
