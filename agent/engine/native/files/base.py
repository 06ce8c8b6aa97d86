"""What every kind of open file is written against: the open file as seen, the source's scope, the target's workshop."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from agent.engine.native.files.socket_options import Address, Buffers, Option, Template
from agent.engine.native.files.unix_diag import UnixDiag
from agent.kernel.namespaces import in_network_namespace
from agent.kernel.openat2 import open_in_root, open_root_of
from agent.kernel.pidfd import pidfd_getfd, pidfd_open
from agent.kernel.procfs import read_link, read_namespace_pids, read_proc
from protocol.errors import KernelError, UnsupportedError
from protocol.messages import Refusal

# Flags of open(2) that act at open and are not kept, or that belong to the descriptor.
CREATION_FLAGS = os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_TRUNC
# O_LARGEFILE as a 64-bit kernel reports it (asm-generic/fcntl.h); os.O_LARGEFILE is 0 there.
O_LARGEFILE = 0o100000
# What a look at a descriptor of a running process may fail with: it was closed, or its connection ended, just now.
PASSING_ERRORS = frozenset({errno.EBADF, errno.ENOENT, errno.ENOTCONN})
# Status flags that F_SETFL can change on an open file.
SETTABLE_FLAGS = os.O_APPEND | os.O_NONBLOCK | os.O_ASYNC | os.O_NOATIME


class ObjectRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of one open file on its way: `id` is what descriptors name it by, `flags` its access mode and status."""

    id: int
    flags: int


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number in the table of a process."""

    number: int
    object: int
    cloexec: bool


class TransientStateError(UnsupportedError):
    """Something that cannot be carried just now but soon can: thaw, wait a little, try again."""

    code = "transient-state"


@dataclass(slots=True)
class OpenFile:
    """One open file of the process, seen from outside; `fd` is the lowest of the numbers that share it."""

    id: int
    fd: int
    link: str  # what /proc/PID/fd/N points to
    flags: int  # access mode and status flags, without O_CLOEXEC
    offset: int
    mount_id: int
    lines: list[str]  # of fdinfo, behind the common ones
    status: os.stat_result
    numbers: list[tuple[int, bool]] = field(default_factory=list)  # (number, close-on-exec)

    @property
    def kind(self) -> int:
        """The S_IF... of the mode."""
        return stat.S_IFMT(self.status.st_mode)

    @property
    def access(self) -> int:
        """O_RDONLY, O_WRONLY or O_RDWR."""
        return self.flags & os.O_ACCMODE

    @property
    def inode(self) -> int:
        """Of a pipe or socket: its identity on this host."""
        return self.status.st_ino

    def at(self, number: int, flags: int) -> OpenFile:
        """The same open file, seen again under `number`."""
        return OpenFile(number, number, self.link, flags, self.offset, self.mount_id, self.lines, self.status)

    def fields(self) -> dict[str, str]:
        """The lines `name: value` of fdinfo, behind the common ones."""
        found = {}
        for line in self.lines:
            name, colon, value = line.partition(":")
            if colon:
                found[name.strip()] = value.strip()
        return found


@dataclass(frozen=True, slots=True)
class HeldSocket:
    """Our duplicate of a socket of the process, and what it is."""

    sock: socket.socket
    family: int
    kind: int  # SOCK_STREAM, ...
    protocol: int


@dataclass(slots=True)
class Scope:
    """The source's process while it is looked at."""

    pid: int
    container_pid: int
    tcp_mode: str
    storage: str
    pidfd: int
    root_fd: int
    root_path: str
    mount_ids: frozenset[int]
    files: list[OpenFile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _taken: dict[int, int] = field(default_factory=dict)  # by OpenFile.id
    socket_inodes: frozenset[int] = frozenset()
    _sockets: dict[int, HeldSocket] = field(default_factory=dict)  # by inode
    _unix_diag: UnixDiag | None = None

    @classmethod
    def open(cls, pid: int, tcp_mode: str, storage: str) -> Scope:
        """Raises: TaskGoneError, KernelError."""
        pidfd = pidfd_open(pid)
        return cls(
            pid=pid,
            container_pid=read_namespace_pids(pid)[-1],
            tcp_mode=tcp_mode,
            storage=storage,
            pidfd=pidfd,
            root_fd=open_root_of(pid),
            root_path=read_link(f"/proc/{pid}/root"),
            mount_ids=read_mount_ids(pid),
        )

    def set_files(self, files: list[OpenFile]) -> None:
        """The table as it was just read."""
        self.files = files
        self.socket_inodes = frozenset(file.inode for file in files if file.kind == stat.S_IFSOCK)

    def unix_diag(self) -> UnixDiag:
        """Questions about the unix sockets of the process's network namespace."""
        if self._unix_diag is None:
            with in_network_namespace(f"/proc/{self.pid}/ns/net"):
                self._unix_diag = UnixDiag()
        return self._unix_diag

    def take(self, file: OpenFile) -> int:
        """Our own descriptor of that very open file; closed by `release`. Raises: KernelError."""
        if file.id not in self._taken:
            self._taken[file.id] = pidfd_getfd(self.pidfd, file.fd)
        return self._taken[file.id]

    def hold_socket(self, file: OpenFile) -> HeldSocket:
        """The socket, held until `release`. Raises: KernelError."""
        held = self._sockets.get(file.inode)
        if held is None:
            fd = pidfd_getfd(self.pidfd, file.fd)
            # Python asks for family, type and protocol by itself.
            sock = socket.socket(fileno=fd)
            held = HeldSocket(sock=sock, family=int(sock.family), kind=int(sock.type), protocol=sock.proto)
            self._sockets[file.inode] = held
        return held

    def held_socket(self, inode: int) -> HeldSocket | None:
        """The one held, if it is."""
        return self._sockets.get(inode)

    def held_sockets(self) -> list[HeldSocket]:
        """All that are held."""
        return list(self._sockets.values())

    def let_go_of_socket(self, inode: int) -> None:
        """Close our duplicate of one that the process has closed meanwhile."""
        held = self._sockets.pop(inode, None)
        if held is not None:
            held.sock.close()

    def release(self) -> None:
        """Close what `take` and `hold_socket` made, so that a file that the process closes is closed."""
        for held in self._sockets.values():
            held.sock.close()
        self._sockets.clear()
        self.release_files()

    def release_files(self) -> None:
        """Close what `take` made."""
        for fd in self._taken.values():
            os.close(fd)
        self._taken.clear()

    def close(self) -> None:
        """Close everything; idempotent."""
        self.release()
        if self._unix_diag is not None:
            self._unix_diag.close()
            self._unix_diag = None
        for fd in (self.pidfd, self.root_fd):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.root_fd = -1

    def is_outside(self, file: OpenFile) -> bool:
        """Whether a file with a path lies on a mount that the container does not have."""
        return file.mount_id not in self.mount_ids

    def open_path_status(self, path: str) -> os.stat_result:
        """What a path of the container leads to. Raises: KernelError: nowhere."""
        fd = open_in_root(self.root_fd, path, os.O_PATH | os.O_NOFOLLOW)
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def refusal(self, file: OpenFile, code: str, reason: str, hint: str = "") -> Refusal:
        """A refusal that names the process, the descriptor, what it is and why."""
        return Refusal(
            code=code,
            message=f"process {self.container_pid}, fd {file.fd} ({file.link}): {reason}",
            hint=hint,
            pid=self.container_pid,
            fd=file.fd,
            object=file.link,
        )

    def refuse(self, file: OpenFile, code: str, reason: str, hint: str = "") -> UnsupportedError:
        """The same as an error, for what is first seen in the freeze."""
        found = self.refusal(file, code, reason, hint)
        return UnsupportedError(found.message, code=code, hint=hint)


class Remote(Protocol):
    """System calls in the target's process; `agent.engine.native.remote.RemoteSyscalls` is the real one."""

    def batch(self, calls: Sequence[Sequence[int]], keep_going: bool = False) -> list[int]:
        """Make them all. Raises: KernelError: the first that failed."""

    def place(self, data: bytes) -> int:
        """Bytes in the process's scratch memory; gives their address."""

    def reserve(self, size_bytes: int) -> int:
        """Room in the process's scratch memory; gives its address."""

    def read(self, address: int, size_bytes: int) -> bytes:
        """Bytes of the process's memory."""


@dataclass(slots=True)
class PreparedSocket:
    """What of an internet socket does not change in the freeze, read before it."""

    held: HeldSocket
    local: Address
    peer: Address | None
    options: list[Option]
    buffers: Buffers
    scales: int = 0  # TCP: window scales
    negotiated: int = 0  # TCP: tcpi_options


@dataclass(frozen=True, slots=True)
class MadeAhead:
    """A socket in repair mode, made before the freeze, and what was given to it."""

    sock: socket.socket
    family: int
    local: Address
    options: list[Option]


@dataclass(slots=True)
class Workshop:
    """Where the target's objects are made: in the agent, in the container's network namespace, seen from its root."""

    pid: int
    root_fd: int
    stdio: dict[int, int] = field(default_factory=dict)  # role -> our duplicate of what the runtime gave
    pairs: dict[str, tuple[int, int]] = field(default_factory=dict)  # 'pipe:1' -> both ends, until all are placed
    made: dict[int, int] = field(default_factory=dict)  # object id -> our descriptor
    prepared_sockets: dict[int, MadeAhead] = field(default_factory=dict)  # object id -> made before the freeze

    def open_path(self, path: str, flags: int) -> int:
        """Open a path of the container as the container would find it. Raises: KernelError."""
        return open_in_root(self.root_fd, path, flags)

    def close(self) -> None:
        """Close every descriptor of ours; what was passed on lives in the process."""
        owned = {*self.made.values(), *self.stdio.values(), *(fd for pair in self.pairs.values() for fd in pair)}
        for fd in owned - {-1}:
            os.close(fd)
        self.made.clear()
        self.stdio.clear()
        self.pairs.clear()
        for ahead in self.prepared_sockets.values():
            ahead.sock.close()
        self.prepared_sockets.clear()
        if self.root_fd >= 0:
            os.close(self.root_fd)
            self.root_fd = -1


class Kind(Protocol):
    """One file of this folder: a kind of open file."""

    def matches(self, file: OpenFile, scope: Scope) -> bool:
        """Whether this open file is of this kind."""

    def check(self, file: OpenFile, scope: Scope) -> list[Refusal]:
        """Why it cannot be carried; nothing is changed."""

    def dump(self, file: OpenFile, scope: Scope) -> ObjectRecord:
        """The record, in the freeze. Raises: UnsupportedError, TransientStateError, KernelError."""


class SocketKind(Protocol):
    """A kind whose dump is mostly done before the freeze."""

    def matches(self, file: OpenFile, scope: Scope) -> bool:
        """Whether this open file is of this kind."""

    def check(self, file: OpenFile, scope: Scope) -> list[Refusal]:
        """Why it cannot be carried; nothing is changed."""

    def prepare(self, file: OpenFile, scope: Scope, template: Template) -> PreparedSocket:
        """All that does not change in the freeze; the socket is not touched."""

    def dump(self, file: OpenFile, scope: Scope, prepared: PreparedSocket) -> ObjectRecord:
        """The record, in the freeze. Raises: UnsupportedError, TransientStateError, KernelError."""


def read_mount_ids(pid: int) -> frozenset[int]:
    """Ids of all mounts that the process can reach.   Source: proc_pid_mountinfo(5)."""
    return frozenset(int(line.split(b" ", 1)[0]) for line in read_proc(f"/proc/{pid}/mountinfo").splitlines())


def status_flags(flags: int) -> int:
    """Flags as they are when the file is opened again: no creation, no descriptor flag."""
    return flags & ~(CREATION_FLAGS | os.O_CLOEXEC | O_LARGEFILE)


def set_flags(fd: int, flags: int) -> None:
    """Give an object the status flags that F_SETFL may change, when it has others. Raises: KernelError."""
    before = fcntl.fcntl(fd, fcntl.F_GETFL)
    wanted = (before & ~SETTABLE_FLAGS) | (flags & SETTABLE_FLAGS)
    if wanted != before:
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
        except OSError as error:
            raise KernelError("fcntl(F_SETFL)", error.errno or 0, error.strerror or "") from error
