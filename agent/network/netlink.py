"""A small, blocking netlink: requests with acknowledgement, dumps, and batches that are built ahead of time.

Why not a library here: in the freeze a request has to be one send and one recv of bytes that exist already, and the
same socket has to be made in another network namespace by a thread of ours.
Source: netlink(7), rtnetlink(7); struct layouts in linux/netlink.h and linux/rtnetlink.h.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Self

from protocol.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

# linux/netlink.h
NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12
NLM_F_REQUEST = 0x01
NLM_F_ACK = 0x04
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_DUMP = 0x300
NLM_F_DUMP_INTR = 0x10
NLM_F_ACK_TLVS = 0x200
NLM_F_CAPPED = 0x100
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSGERR_ATTR_MSG = 1
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF
SOL_NETLINK = 270
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11

_HEADER = struct.Struct("=IHHII")
_ERROR_OFFSET = _HEADER.size
_RECEIVE_BYTES = 1 << 18  # A dump's datagram is at most 32 KiB; an ack a few hundred bytes.
_TIMEOUT_S = 10.0  # The kernel answers in the send itself; only a bug could make us wait.
_DUMP_ATTEMPTS = 10  # A table that changes while it is dumped is read again.


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return struct.pack("=HH", 4 + len(data), kind) + data + b"\x00" * (-len(data) % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | NLA_F_NESTED, b"".join(parts))


def u8(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=B", value))


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\x00")


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes in `data` from `offset` on; the last of a kind counts."""
    found: dict[int, bytes] = {}
    while offset + 4 <= len(data):
        size_bytes, kind = struct.unpack_from("=HH", data, offset)
        if size_bytes < 4:
            break
        found[kind & NLA_TYPE_MASK] = data[offset + 4 : offset + size_bytes]
        offset += (size_bytes + 3) & ~3
    return found


def as_int(data: bytes | None) -> int:
    """A number of any width in the machine's byte order; 0 when it is absent."""
    if data is None:
        return 0
    return int.from_bytes(data, "little" if struct.pack("=H", 1)[0] else "big")


def as_text(data: bytes | None) -> str:
    return "" if data is None else data.rstrip(b"\x00").decode(errors="replace")


def message(kind: int, flags: int, body: bytes, *, sequence: int = 1) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | flags, sequence, 0) + body


class Batch:
    """Requests that are sent together by one send; the kernel carries them out in order.

    Each has a name for its error; nothing is computed when they are sent.
    """

    def __init__(self, requests: Sequence[tuple[str, bytes]]) -> None:
        self.calls = tuple(call for call, _ in requests)
        self.data = b"".join(data for _, data in requests)


class Netlink:
    """One netlink socket of the calling thread's network namespace."""

    def __init__(self, family: int = NETLINK_ROUTE) -> None:
        """Raises: KernelError: the kernel has no such family."""
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        except OSError as error:
            raise KernelError(
                f"socket(AF_NETLINK, {family})", error.errno or 0, os.strerror(error.errno or 0)
            ) from error
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._socket.bind((0, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def request(self, call: str, kind: int, body: bytes, flags: int = 0) -> None:
        """Send one request and wait for its acknowledgement. `call` names it in the error.

        Raises: KernelError: the kernel's errno and, where it gives one, its explanation.
        """
        self.run(Batch([(call, message(kind, flags | NLM_F_ACK, body))]))

    def run(self, batch: Batch) -> None:
        """Send a batch and check every acknowledgement; all are read, then the first error is raised.

        Raises: KernelError: of the first request that failed. The others were still carried out.
        """
        first: KernelError | None = None
        self._socket.send(batch.data)
        for call in batch.calls:
            reply = self._socket.recv(_RECEIVE_BYTES)
            failure = _failure(call, reply)
            first = first or failure
        if first is not None:
            raise first

    def get(self, call: str, kind: int, body: bytes) -> bytes:
        """Ask for one object; its message body.

        Raises: KernelError: there is none, or the request is refused.
        """
        self._socket.send(message(kind, 0, body))
        reply = self._socket.recv(_RECEIVE_BYTES)
        if _HEADER.unpack_from(reply)[1] == NLMSG_ERROR:
            failure = _failure(call, reply)
            if failure is not None:
                raise failure
        return reply[_HEADER.size :]

    def dump(self, call: str, kind: int, body: bytes) -> list[bytes]:
        """The bodies of all objects of a table, as of one moment.

        Raises: KernelError: the dump is refused, or the table never held still.
        """
        for _ in range(_DUMP_ATTEMPTS):
            found: list[bytes] = []
            consistent = True
            self._socket.send(message(kind, NLM_F_DUMP, body))
            for _kind, flags, part in self._until_done(call):
                consistent = consistent and not flags & NLM_F_DUMP_INTR
                found.append(part)
            if consistent:
                return found
        raise KernelError(call, 11, "the table changed each time it was read", hint="try again")

    def _until_done(self, call: str) -> Iterator[tuple[int, int, bytes]]:
        while True:
            datagram = self._socket.recv(_RECEIVE_BYTES)
            offset = 0
            while offset + _HEADER.size <= len(datagram):
                size_bytes, kind, flags, _, _ = _HEADER.unpack_from(datagram, offset)
                part = datagram[offset : offset + size_bytes]
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    failure = _failure(call, part)
                    if failure is not None:
                        raise failure
                    return
                yield kind, flags, part[_HEADER.size :]
                offset += (size_bytes + 3) & ~3


def _failure(call: str, reply: bytes) -> KernelError | None:
    size_bytes, kind, flags, _, _ = _HEADER.unpack_from(reply)
    if kind != NLMSG_ERROR:
        return KernelError(call, 0, f"the kernel answered with message type {kind} instead of an acknowledgement")
    (code,) = struct.unpack_from("=i", reply, _ERROR_OFFSET)
    if code == 0:
        return None
    explanation = ""
    if flags & NLM_F_ACK_TLVS:
        # With CAP_ACK only the header of the request comes back before the attributes.
        extra = attributes(reply[:size_bytes], _ERROR_OFFSET + 4 + _HEADER.size)
        explanation = as_text(extra.get(NLMSGERR_ATTR_MSG))
    return KernelError(call, -code, explanation or os.strerror(-code))
