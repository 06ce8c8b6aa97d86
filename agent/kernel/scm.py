"""Passing descriptors over a unix socket. Source: unix(7), SCM_RIGHTS."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence

from agent.kernel.syscalls import os_failure
from agent.kernel.types import Fd

MAX_AT_ONCE = 250  # linux/socket.h has SCM_MAX_FD 253; a round number below it


def send_descriptors(sock: socket.socket, descriptors: Sequence[int], data: bytes = b"\0") -> None:
    """One message. Raises: KernelError; ValueError: more than MAX_AT_ONCE."""
    if len(descriptors) > MAX_AT_ONCE:
        raise ValueError(f"{len(descriptors)} descriptors in one message; {MAX_AT_ONCE} is the limit")
    rights = array.array("i", descriptors)
    try:
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    except OSError as error:
        raise os_failure(f"sendmsg({len(descriptors)} descriptors)", error) from error


def receive_descriptors(sock: socket.socket, limit: int = MAX_AT_ONCE, data_bytes: int = 1) -> tuple[bytes, list[Fd]]:
    """One message: its data and its descriptors, close-on-exec. More than `limit` is an error; none is leaked.

    Raises: KernelError.
    """
    item = array.array("i").itemsize
    flags = socket.MSG_CMSG_CLOEXEC
    try:
        data, ancillary, got_flags, _ = sock.recvmsg(data_bytes, socket.CMSG_SPACE(limit * item), flags)
    except OSError as error:
        raise os_failure("recvmsg(descriptors)", error) from error
    received = array.array("i")
    for level, kind, raw in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(raw[: len(raw) - len(raw) % item])
    if got_flags & socket.MSG_CTRUNC:
        for number in received:
            os.close(number)
        raise os_failure(f"recvmsg(more than {limit} descriptors)", OSError(7, "E2BIG"))
    return data, [Fd(number) for number in received]
