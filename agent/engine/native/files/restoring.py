"""The open files of a process made at the target and put under their numbers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from agent.engine.base import RepairedSocket
from agent.engine.native.files import registry, tcp_restore, unix_restore
from agent.engine.native.files.base import ObjectRecord, Remote, Workshop
from agent.engine.native.files.epoll import EPOLL_CTL_ADD, Epoll, pack_event
from agent.engine.native.files.passing import place_descriptors
from agent.engine.native.files.section import FilesSection
from agent.engine.native.files.tcp import TcpConnection
from agent.engine.native.files.tcp_listen import TcpListener
from agent.engine.native.files.unix_sockets import UnixSocket
from agent.kernel.namespaces import in_network_namespace
from agent.kernel.openat2 import open_root_of
from agent.kernel.pidfd import pidfd_getfd, pidfd_open
from agent.kernel.unistd import SYS, X86_64
from protocol.errors import KernelError, RemoteProtocolError


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreContext:
    """`remote`: system calls in the stopped process. `stdio`: role (0, 1, 2) -> its number there."""

    pid: int  # host pid
    remote: Remote
    stdio: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 1, 2: 2})
    network_namespace: str = ""  # path; '' : the process's own


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredFiles:
    """`receive_next`: as ReleasePackets wants it."""

    repaired: list[RepairedSocket]
    receive_next: dict[str, int]


def restore(section: FilesSection, context: RestoreContext, workshop: Workshop | None = None) -> RestoredFiles:
    """Make every object, pass all, fill epoll instances. Connections are complete, and still in repair mode.

    The process is stopped; the network is up in its namespace, and cut off. `workshop`: from `prepare_restore`.
    Raises: KernelError, UnsupportedError: something is missing or in the way at this host.
    """
    _check_references(section)
    workshop = workshop or open_workshop(context)
    try:
        with in_network_namespace(context.network_namespace or f"/proc/{context.pid}/ns/net"):
            # Listeners first: a connection in repair mode binds beside anything, a listener does not.
            for record in sorted(section.objects, key=_order):
                if not isinstance(record, UnixSocket):
                    workshop.made[record.id] = registry.restore_object(record, workshop)
            unix_restore.restore_all([record for record in section.objects if isinstance(record, UnixSocket)], workshop)
        _place(section, context, workshop)
    finally:
        workshop.close()
    return _outcome(section, context.pid)


def prepare_restore(section: FilesSection, context: RestoreContext) -> Workshop:
    """Before the freeze: sockets of the connections in `section` (its contents do not matter) made, bound, options set.

    What comes of it goes to `restore`, or is closed. A connection that is another by then is made anew.
    Raises: KernelError.
    """
    workshop = open_workshop(context)
    try:
        with in_network_namespace(context.network_namespace or f"/proc/{context.pid}/ns/net"):
            for record in section.objects:
                if isinstance(record, TcpConnection):
                    workshop.prepared_sockets[record.id] = tcp_restore.make_ahead(record)
    except BaseException:
        workshop.close()
        raise
    return workshop


def open_workshop(context: RestoreContext) -> Workshop:
    """With our own duplicates of what the target's runtime gave the container."""
    workshop = Workshop(pid=context.pid, root_fd=open_root_of(context.pid))
    pidfd = pidfd_open(context.pid)
    try:
        for role, number in context.stdio.items():
            try:
                workshop.stdio[role] = pidfd_getfd(pidfd, number)
            except KernelError:
                continue  # the runtime gave none; refused when the source had one
    except BaseException:
        workshop.close()
        raise
    finally:
        os.close(pidfd)
    return workshop


def _order(record: ObjectRecord) -> int:
    return 0 if isinstance(record, TcpListener) else 1


def _check_references(section: FilesSection) -> None:
    """Nothing from a peer is believed: every number once, every object known."""
    ids = {record.id for record in section.objects}
    numbers = {descriptor.number for descriptor in section.descriptors}
    if len(ids) != len(section.objects) or len(numbers) != len(section.descriptors):
        raise RemoteProtocolError("a descriptor or an open file stands twice in the section of files")
    if any(descriptor.object not in ids or descriptor.number < 0 for descriptor in section.descriptors):
        raise RemoteProtocolError("a descriptor of an open file that is not in the section of files")


def _place(section: FilesSection, context: RestoreContext, workshop: Workshop) -> None:
    epolls = {record.id: record for record in section.objects if isinstance(record, Epoll)}
    numbers: dict[int, int] = {}  # object id -> one of its numbers
    for descriptor in section.descriptors:
        numbers.setdefault(descriptor.object, descriptor.number)
    entries = [
        (numbers[identity], entry)
        for identity, record in epolls.items()
        if identity in numbers
        for entry in record.entries
    ]
    events = [pack_event(entry, packed=SYS is X86_64) for _, entry in entries]
    first = context.remote.place(b"".join(events))
    place_descriptors(
        context.pid,
        context.remote,
        {descriptor.number: workshop.made[descriptor.object] for descriptor in section.descriptors},
        [descriptor.number for descriptor in section.descriptors if descriptor.cloexec],
        [
            (SYS.epoll_ctl, epoll_number, EPOLL_CTL_ADD, entry.target, first + index * len(events[0]))
            for index, (epoll_number, entry) in enumerate(entries)
        ],
    )


def _outcome(section: FilesSection, pid: int) -> RestoredFiles:
    numbers: dict[int, int] = {}
    for descriptor in section.descriptors:
        numbers.setdefault(descriptor.object, descriptor.number)
    connections = [record for record in section.objects if isinstance(record, TcpConnection)]
    return RestoredFiles(
        repaired=[
            RepairedSocket(pid=pid, fd=numbers[record.id], unsent=b"" if record.fin_went else record.unsent)
            for record in connections
        ],
        receive_next={
            tcp_restore.connection_key(record.local, record.peer): (record.receive_next + record.fin_came) % (1 << 32)
            for record in connections
        },
    )
