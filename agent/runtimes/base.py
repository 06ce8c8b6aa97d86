"""What the agent needs of a container runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeContainer:
    """A container as its runtime lists it; `pid` is the host pid of its init, 0 when it has none."""

    name: str
    pid: int
    status: str  # created, running, paused, stopped
    bundle: str


class Runtime(Protocol):
    """One runtime with one state directory. Every method may raise MigrateError code 'runtime'."""

    @property
    def kind(self) -> str:
        """runc, crun."""

    @property
    def root(self) -> str:
        """Its state directory."""

    def version(self) -> str:
        """The version as the runtime prints it."""

    def containers(self) -> list[RuntimeContainer]:
        """All containers, also stopped ones."""

    def find(self, name: str) -> RuntimeContainer | None:
        """One container, or None."""

    def create(self, name: str, bundle: str, *, log_path: str, monotonic_offset_ns: int | None) -> RuntimeContainer:
        """Create without starting; stdin is /dev/null, stdout and stderr append to `log_path`.

        `monotonic_offset_ns`: the container's CLOCK_MONOTONIC against this process's; None: no time namespace.
        """

    def start_argv(self, name: str) -> list[str]:
        """The command that starts a created container."""

    def delete(self, name: str) -> None:
        """Kill what still runs and forget the container; fine if it is not there."""
