"""What the kernel knows of unix sockets, one by one, over NETLINK_SOCK_DIAG."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from protocol.errors import KernelError

# linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_SHOW_NAME, _SHOW_VFS, _SHOW_PEER, _SHOW_RQLEN = 1, 2, 4, 16
_NAME, _VFS, _PEER, _RQLEN, _SHUTDOWN = 0, 1, 2, 4, 6
_ALL_STATES = 0xFFFFFFFF
_NO_COOKIE = 0xFFFFFFFF
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIIIII")
_ANSWER_BYTES = 16  # struct unix_diag_msg
_ATTRIBUTE = struct.Struct("=HH")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixFacts:
    """`peer`: inode, 0 for none. `file_inode`: of the socket's file, 0 for none. `shutdown`: 1 reading, 2 writing."""

    state: int
    peer: int = 0
    name: bytes = b""
    file_inode: int = 0
    waiting: int = 0  # bytes; of a listener connections
    backlog: int = 0
    shutdown: int = 0


class UnixDiag:
    """A netlink socket of the network namespace in which it is made. Source: sock_diag(7)."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def look_up(self, inode: int) -> UnixFacts:
        """Raises: KernelError: no such socket in this namespace."""
        body = _REQUEST.pack(
            socket.AF_UNIX, 0, 0, _ALL_STATES, inode, _SHOW_NAME | _SHOW_VFS | _SHOW_PEER | _SHOW_RQLEN, _NO_COOKIE,
            _NO_COOKIE,
        )  # fmt: skip
        header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
        self._socket.send(header + body)
        return self._parse(self._socket.recv(8192), inode)

    @staticmethod
    def _parse(answer: bytes, inode: int) -> UnixFacts:
        length, kind, _, _, _ = _HEADER.unpack_from(answer)
        if kind == _NLMSG_ERROR:
            number = -struct.unpack_from("=i", answer, _HEADER.size)[0]
            raise KernelError(f"sock_diag(unix socket {inode})", number, os.strerror(number))
        state = answer[_HEADER.size + 2]
        found = {}
        at = _HEADER.size + _ANSWER_BYTES
        while at + _ATTRIBUTE.size <= length:
            size, attribute = _ATTRIBUTE.unpack_from(answer, at)
            found[attribute] = answer[at + _ATTRIBUTE.size : at + size]
            at += -(-size // 4) * 4
        return UnixFacts(
            state=state,
            peer=_unsigned(found.get(_PEER)),
            name=found.get(_NAME, b""),
            file_inode=_unsigned(found.get(_VFS)),
            waiting=_unsigned(found.get(_RQLEN)),
            backlog=_unsigned(found.get(_RQLEN, b"")[4:]),
            shutdown=found.get(_SHUTDOWN, b"\0")[0],
        )


def _unsigned(value: bytes | None) -> int:
    return int(struct.unpack_from("=I", value)[0]) if value else 0
