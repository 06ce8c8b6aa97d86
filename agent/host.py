"""What every part of one agent shares: its settings, journal, runtimes and name."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from agent.journal import Journal
from agent.runtimes.base import Runtime
from agent.runtimes.oci import open_runtime
from agent.settings import Settings
from protocol.errors import UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """This host, as the agent knows it."""

    name: str
    settings: Settings
    journal: Journal
    runtimes: tuple[Runtime, ...]
    missing_runtimes: dict[str, str]  # kind: why it is not usable

    @property
    def state_dir(self) -> Path:
        """Where the journal and the logs of moved containers lie."""
        return Path(self.settings.state_dir)

    def runtime(self, kind: str) -> Runtime:
        """The configured runtime of this kind. Raises: UnsupportedError."""
        for runtime in self.runtimes:
            if runtime.kind == kind:
                return runtime
        raise UnsupportedError(
            f"runtime {kind} is not to be had here: {self.missing_runtimes.get(kind, 'not configured')}",
            code="runtime-missing", host=self.name, hint=f"install {kind} and list it under [[runtimes]] in agent.toml",
        )  # fmt: skip


def open_host(settings: Settings) -> Host:
    """Open the journal and find the runtimes. A runtime that is not installed is noted, not fatal."""
    runtimes: list[Runtime] = []
    missing: dict[str, str] = {}
    for section in settings.runtimes:
        try:
            runtimes.append(open_runtime(section.kind, section.root, section.binary))
        except UnsupportedError as error:
            missing[section.kind] = error.message
    return Host(
        name=settings.name or socket.gethostname(), settings=settings, journal=Journal(Path(settings.state_dir)),
        runtimes=tuple(runtimes), missing_runtimes=missing,
    )  # fmt: skip
