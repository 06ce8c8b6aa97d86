"""UDP sockets: address, peer, options.

Does not survive: datagrams that came and were not read (said in a warning, as a lost packet would be); multicast
groups (refused).
"""

from __future__ import annotations

import socket

from agent.engine.native.files.base import (
    ObjectRecord,
    OpenFile,
    PreparedSocket,
    Scope,
    Workshop,
    set_flags,
    status_flags,
)
from agent.engine.native.files.pipes import pending_bytes
from agent.engine.native.files.socket_options import (
    Address,
    Buffers,
    Option,
    Template,
    bind,
    has_filter,
    read_buffers,
    set_buffers,
    set_options,
)
from agent.kernel.procfs import read_proc
from agent.kernel.syscalls import os_failure
from protocol.messages import Refusal

_UDP = socket.IPPROTO_UDP
# 224.0.0.1, which every interface is in, as /proc/net/igmp writes it.
_ALL_HOSTS = b"010000E0"


class UdpSocket(ObjectRecord, frozen=True, kw_only=True, tag="udp-socket"):
    """`peer`: of a connected one."""

    family: int
    local: Address
    peer: Address | None
    options: list[Option]
    buffers: Buffers


def matches(file: OpenFile, scope: Scope) -> bool:
    """A UDP socket (not UDP-Lite)."""
    if not file.link.startswith("socket:["):
        return False
    held = scope.hold_socket(file)
    return held.family in {socket.AF_INET, socket.AF_INET6} and held.protocol == _UDP


def check(file: OpenFile, scope: Scope) -> list[Refusal]:
    """Filters, and multicast groups, which no call tells of one socket."""
    refusals = []
    if has_filter(scope.hold_socket(file).sock):
        refusals.append(scope.refusal(file, "socket-filter", "a BPF filter is attached"))
    groups = [line.split()[0] for line in read_proc(f"/proc/{scope.pid}/net/igmp").splitlines() if line[:1] in b"\t "]
    if any(group != _ALL_HOSTS for group in groups):
        refusals.append(
            scope.refusal(file, "udp-multicast", "a socket of this network namespace is in a multicast group")
        )
    return refusals


def prepare(file: OpenFile, scope: Scope, template: Template) -> PreparedSocket:
    """Options and buffers."""
    held = scope.hold_socket(file)
    return PreparedSocket(
        held=held,
        local=Address.of(held.sock.getsockname()),
        peer=None,
        options=template.differing(held.sock, held.family, _UDP),
        buffers=read_buffers(held.sock),
    )


def dump(file: OpenFile, scope: Scope, prepared: PreparedSocket) -> UdpSocket:
    """The socket; what waits in it is counted, not carried."""
    sock = prepared.held.sock
    waiting = pending_bytes(sock.fileno())
    if waiting:
        scope.warnings.append(
            f"process {scope.container_pid}, fd {file.fd}: unread datagrams of UDP port {prepared.local.port} are lost"
        )
    try:
        peer = Address.of(sock.getpeername())
    except OSError:
        peer = None  # not connected
    return UdpSocket(
        id=file.id,
        flags=status_flags(file.flags),
        family=prepared.held.family,
        local=Address.of(sock.getsockname()),
        peer=peer,
        options=prepared.options,
        buffers=prepared.buffers,
    )


def restore(record: UdpSocket, workshop: Workshop) -> int:  # noqa: ARG001 - the interface of all kinds
    """Make, bind, connect, in the thread's network namespace. Raises: KernelError."""
    with socket.socket(record.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _UDP) as sock:
        set_options(sock, record.options)
        set_buffers(sock, record.buffers)
        if record.local.port:
            bind(sock, record.local)
        if record.peer is not None:
            try:
                sock.connect(record.peer.for_call(record.family))
            except OSError as error:
                raise os_failure(f"connect({record.peer.host}, UDP port {record.peer.port})", error) from error
        set_flags(sock.fileno(), record.flags)
        return sock.detach()
