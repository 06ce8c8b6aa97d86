"""The dump of a process's open files: most of it before the freeze, the rest in it."""

from __future__ import annotations

from typing import Self

from agent.engine.native.files import registry, regular_files, tcp
from agent.engine.native.files.base import (
    PASSING_ERRORS,
    Descriptor,
    ObjectRecord,
    OpenFile,
    PreparedSocket,
    Scope,
    SocketKind,
)
from agent.engine.native.files.checking import CheckContext, check
from agent.engine.native.files.section import FilesSection
from agent.engine.native.files.socket_options import Template
from agent.engine.native.files.table import read_table, reread_table
from agent.kernel.namespaces import in_network_namespace
from protocol.errors import KernelError, UnsupportedError
from protocol.messages import Refusal


class PreparedDump:
    """The open files of one process, looked at before the freeze.

    Our duplicates keep a socket alive that the process closes meanwhile: prepare just before the freeze, and close.
    """

    def __init__(self, scope: Scope, template: Template) -> None:
        self._scope = scope
        self._template = template
        self._sockets: dict[int, tuple[SocketKind, PreparedSocket]] = {}  # by inode
        self._connections = 0

    @classmethod
    def prepare(cls, pid: int, tcp_mode: str = "keep", storage: str = "none") -> Self:
        """Read the table, take the sockets, read what is static of them. Nothing is changed.

        Raises: UnsupportedError: something came since `check` that cannot be carried. TaskGoneError, KernelError.
        """
        scope = Scope.open(pid, tcp_mode, storage)
        try:
            template = Template()
            scope.unix_diag()
            with in_network_namespace(f"/proc/{pid}/ns/net"):
                template.prepare()
            made = cls(scope, template)
            scope.set_files(read_table(scope))
            found = [made._prepare_running(file) for file in scope.files]
            if any(found):
                # Once more and by itself: the process runs, and may just have been changing its table.
                _refuse(check(CheckContext(pid=pid, tcp_mode=tcp_mode, storage=storage)).refusals)
            scope.release_files()
        except BaseException:
            scope.close()
            raise
        return made

    def dump(self) -> FilesSection:
        """Everything, frozen and with the network cut; connections are in repair mode after, also on an error.

        Raises: UnsupportedError: something new, or a state, that cannot be carried. TransientStateError: try again.
        """
        scope = self._scope
        before = {(file.fd, file.link, file.flags) for file in scope.files}
        scope.set_files(reread_table(scope, scope.files))
        objects = [self._dump_one(file, is_new=(file.fd, file.link, file.flags) not in before) for file in scope.files]
        scope.release_files()
        self._connections = sum(isinstance(record, tcp.TcpConnection) for record in objects)
        return FilesSection(
            descriptors=[
                Descriptor(number=number, object=file.id, cloexec=cloexec)
                for file in scope.files
                for number, cloexec in file.numbers
            ],
            objects=objects,  # type: ignore[arg-type]  # every kind's record is in the union: a test walks the registry
            warnings=list(scope.warnings),
        )

    @property
    def connections(self) -> int:
        """TCP connections that the last dump put into repair mode."""
        return self._connections

    def undo(self) -> None:
        """Roll back: out of repair mode without a word on the wire. Idempotent."""
        for held in self._scope.held_sockets():
            if held.protocol == tcp.IPPROTO_TCP and held.family in tcp.FAMILIES:
                tcp.leave_repair(held.sock, tcp.REPAIR_OFF_NO_WP)

    def close(self) -> None:
        """Let go of everything; sockets in repair mode stay in it. Idempotent."""
        self._sockets.clear()
        self._scope.close()

    def _prepare_running(self, file: OpenFile) -> list[Refusal]:
        """What the running process closes or loses while we look is left for the freeze."""
        try:
            found = self._prepare_socket(file)
            kind = registry.find_kind(file, self._scope) if found is None else found[0]
            return kind.check(file, self._scope)
        except (KernelError, OSError) as error:
            if error.errno not in PASSING_ERRORS:
                raise
            return []

    def _prepare_socket(self, file: OpenFile) -> tuple[SocketKind, PreparedSocket] | None:
        kind = registry.find_socket_kind(file, self._scope)
        if kind is None:
            return None
        found = kind, kind.prepare(file, self._scope, self._template)
        self._sockets[file.inode] = found
        return found

    def _dump_one(self, file: OpenFile, *, is_new: bool) -> ObjectRecord:
        scope = self._scope
        found = None
        if file.link.startswith("socket:["):
            found = self._sockets.get(file.inode)
            if found is None or scope.held_socket(file.inode) is not found[1].held:
                is_new = True
                found = self._prepare_socket(file)
            if found is not None:
                kind, prepared = found
                if is_new:
                    _refuse(kind.check(file, scope))
                return kind.dump(file, scope, prepared)
        plain = registry.find_kind(file, scope)
        if is_new or plain is regular_files:
            _refuse(plain.check(file, scope))
        return plain.dump(file, scope)


def _refuse(refusals: list[Refusal]) -> None:
    if refusals:
        refusal = refusals[0]
        raise UnsupportedError(refusal.message, code=refusal.code, hint=refusal.hint)
