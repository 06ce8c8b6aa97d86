"""Netlink sockets that ask for routes or sockets: address and groups, when nothing is on its way in them.

Does not survive: every other netlink protocol (refused); answers not yet read (the freeze waits for them to be read).
"""

from __future__ import annotations

import select
import socket

from agent.engine.native.files.base import (
    ObjectRecord,
    OpenFile,
    Scope,
    TransientStateError,
    Workshop,
    set_flags,
    status_flags,
)
from agent.kernel.syscalls import os_failure
from protocol.messages import Refusal

# linux/netlink.h
_PROTOCOLS = {0: "NETLINK_ROUTE", 4: "NETLINK_SOCK_DIAG"}


class NetlinkSocket(ObjectRecord, frozen=True, kw_only=True, tag="netlink-socket"):
    """`port`: its address, mostly the pid; `groups`: a mask."""

    protocol: int
    socket_type: int
    port: int
    groups: int


def matches(file: OpenFile, scope: Scope) -> bool:
    """Any netlink socket."""
    return file.link.startswith("socket:[") and scope.hold_socket(file).family == socket.AF_NETLINK


def check(file: OpenFile, scope: Scope) -> list[Refusal]:
    """Only protocols without a state of their own."""
    protocol = scope.hold_socket(file).protocol
    if protocol not in _PROTOCOLS:
        return [scope.refusal(file, "netlink", f"a netlink socket of protocol {protocol}")]
    return []


def dump(file: OpenFile, scope: Scope) -> NetlinkSocket:
    """Raises: TransientStateError: an answer or event waits in it. UnsupportedError."""
    held = scope.hold_socket(file)
    if held.protocol not in _PROTOCOLS:
        raise scope.refuse(file, "netlink", f"a netlink socket of protocol {held.protocol}")
    poller = select.poll()
    poller.register(held.sock, select.POLLIN)
    if poller.poll(0):
        raise TransientStateError(f"process {scope.container_pid}, fd {file.fd}: a netlink message waits to be read")
    port, groups = held.sock.getsockname()
    return NetlinkSocket(
        id=file.id,
        flags=status_flags(file.flags),
        protocol=held.protocol,
        socket_type=held.kind,
        port=port,
        groups=groups,
    )


def restore(record: NetlinkSocket, workshop: Workshop) -> int:  # noqa: ARG001 - the interface of all kinds
    """In the thread's network namespace. Raises: KernelError."""
    kind = record.socket_type | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, record.protocol) as sock:
        if record.port or record.groups:
            try:
                sock.bind((record.port, record.groups))
            except OSError as error:
                raise os_failure(f"bind(netlink port {record.port})", error) from error
        set_flags(sock.fileno(), record.flags)
        return sock.detach()
