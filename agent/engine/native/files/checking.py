"""What stands in the way of a process's open files, found while it runs; nothing is stopped or changed."""

from __future__ import annotations

from dataclasses import dataclass

from agent.engine.native.files import registry, regular_files, tcp
from agent.engine.native.files.base import PASSING_ERRORS, Scope
from agent.engine.native.files.table import read_table
from protocol.errors import KernelError
from protocol.messages import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckContext:
    """`tcp_mode`: keep, close or fail. `storage`: none, or shared."""

    pid: int  # host pid
    tcp_mode: str = "keep"
    storage: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesCheck:
    """`paths`: files open for reading, by their path in the container: the target needs the same."""

    refusals: list[Refusal]
    paths: list[str]
    connections: int
    warnings: list[str]


def check(context: CheckContext) -> FilesCheck:
    """Every refusal at once. Raises: TaskGoneError, KernelError."""
    found = _look(context)
    # A running process changes its table under our eyes: what is refused must be there at a second look too.
    return _look(context) if found.refusals else found


def _look(context: CheckContext) -> FilesCheck:
    scope = Scope.open(context.pid, context.tcp_mode, context.storage)
    try:
        scope.set_files(read_table(scope))
        refusals: list[Refusal] = []
        paths: set[str] = set()
        connections = 0
        for file in scope.files:
            try:
                kind = registry.find_socket_kind(file, scope) or registry.find_kind(file, scope)
                refusals += kind.check(file, scope)
                if kind is regular_files and regular_files.is_content_read(file):
                    paths.add(regular_files.path_in_container(file, scope))
                if kind is tcp and tcp.read_state(scope.hold_socket(file).sock) in tcp.CONNECTED:
                    connections += 1
            except (KernelError, OSError) as error:
                if error.errno not in PASSING_ERRORS:
                    raise
        return FilesCheck(
            refusals=refusals, paths=sorted(paths), connections=connections, warnings=list(scope.warnings)
        )
    finally:
        scope.close()
