"""A FIN, as the peer sent it before, given to our own kernel through a raw socket."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.engine.native.files.tcp import TcpConnection

_FIN_ACK = 0x11
_HEADER_WORDS = 5 << 4
_IPPROTO_RAW = 255
_HOP_LIMIT = 64
# linux/in6.h
_IPV6_HDRINCL = 36


def _checksum(data: bytes) -> int:
    """The internet checksum.   Source: RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def send_fin(record: TcpConnection, acknowledged: int) -> None:
    """From the peer's address to ours, at the sequence number behind what was received; it goes by way of lo."""
    version = socket.AF_INET6 if ":" in record.local.plain_host else socket.AF_INET
    source = socket.inet_pton(version, record.peer.plain_host)
    target = socket.inet_pton(version, record.local.plain_host)
    # The window as last heard: a FIN must not shrink it.
    window = min(struct.unpack_from("I", record.window, 4)[0] >> record.send_scale, 0xFFFF)
    segment = struct.pack(
        "!HHIIBBHHH",
        record.peer.port,
        record.local.port,
        record.receive_next,
        acknowledged,
        _HEADER_WORDS,
        _FIN_ACK,
        window,
        0,
        0,
    )
    pseudo = source + target + struct.pack("!IxxxB", len(segment), socket.IPPROTO_TCP)
    segment = segment[:16] + struct.pack("!H", _checksum(pseudo + segment)) + segment[18:]
    with socket.socket(version, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _IPPROTO_RAW) as raw:
        if version == socket.AF_INET:
            header = struct.pack(
                "!BBHHHBBH4s4s", 0x45, 0, 20 + len(segment), 0, 0, _HOP_LIMIT, socket.IPPROTO_TCP, 0, source, target
            )
            raw.sendto(header + segment, (record.local.plain_host, 0))
        else:
            header = struct.pack("!IHBB16s16s", 6 << 28, len(segment), socket.IPPROTO_TCP, _HOP_LIMIT, source, target)
            raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
            raw.sendto(header + segment, (record.local.plain_host, 0, 0, record.local.scope))
