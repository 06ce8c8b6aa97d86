"""Packet sockets: one that catches what is for a container, one that delivers it.

Both are plain sockets that can be passed to another process by SCM_RIGHTS. What they give and take is a captured
frame: a virtio header of ten bytes and the Ethernet frame.
Source: packet(7); linux/if_packet.h; linux/filter.h, Documentation/networking/filter.rst.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from typing import TYPE_CHECKING

from agent.network.frames import ETH_P_ARP, ETH_P_IPV6, VNET_HEADER_BYTES
from protocol.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# linux/if_packet.h
SOL_PACKET = 263
PACKET_STATISTICS = 6
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
# linux/if_ether.h: ETH_P_IP would miss what a bridge forwards.
ETH_P_ALL = 3
# asm-generic/socket.h
SO_ATTACH_FILTER = 26
SO_RCVBUFFORCE = 33

# A second of 100 Mbit/s; what is beyond is dropped by the kernel and counted.
CAPTURE_BYTES = 16 << 20
# A large frame before segmentation is at most 64 KiB of IP, and 512 KiB with BIG TCP.
FRAME_BYTES = 1 << 19
# Jumps of a classic filter are 8 bits: with more addresses than this the exact choice is left to the reader.
_MAX_FILTERED = 100

_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE = 0x20, 0x28, 0x30
_JUMP_EQUAL, _RETURN = 0x15, 0x06
_WHOLE = 0xFFFFFFFF


def open_capture(
    device: str, mac: bytes, addresses: Iterable[bytes], *, buffer_bytes: int = CAPTURE_BYTES
) -> socket.socket:
    """A non-blocking socket that gets the frames on `device` to `mac`, and ARP and ND questions for `addresses`.

    Raises: KernelError: no such device in the calling thread's namespace, or not permitted.
    """
    try:
        # Protocol 0: nothing comes in before the filter is in place.
        capture = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        capture.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        capture.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        capture.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer_bytes)
        _attach(capture, filter_program(mac, addresses))
        capture.bind((device, ETH_P_ALL))
    except OSError as error:
        raise KernelError(f"open capture on {device}", error.errno or 0, error.strerror or "") from error
    return capture


def open_injector(device: str) -> socket.socket:
    """A socket whose frames leave through `device`; it receives nothing.

    Sent on the host end of a container's veth they arrive in the container.
    Raises: KernelError: no such device in the calling thread's namespace, or not permitted.
    """
    try:
        injector = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        injector.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        injector.bind((device, 0))
    except OSError as error:
        raise KernelError(f"open injector on {device}", error.errno or 0, error.strerror or "") from error
    return injector


def drain(capture: socket.socket) -> Iterator[bytes]:
    """The frames that were caught so far; ends when there is none, without waiting. Raises: KernelError."""
    while True:
        try:
            yield capture.recv(FRAME_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            # Said once, when the catcher is removed; what was caught before can still be read.
            if error.errno != errno.ENETDOWN:
                raise KernelError("read a captured frame", error.errno or 0, error.strerror or "") from error


def discard(capture: socket.socket) -> int:
    """Throw away what was caught so far, and count it."""
    scratch = bytearray(VNET_HEADER_BYTES)  # The kernel insists on room for the header; the rest is cut off.
    count = 0
    while True:
        try:
            capture.recv_into(scratch, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return count
        count += 1


# The device is full, or this one frame does not fit it: a network may lose a frame, and the sender repeats it.
_LOST = {errno.ENOBUFS, errno.EAGAIN, errno.EMSGSIZE, errno.EINVAL, errno.E2BIG}


def inject(injector: socket.socket, frame: bytes) -> bool:
    """Deliver one captured frame; False when it was lost.

    Raises: KernelError: the device is gone or down.
    """
    try:
        injector.send(frame)
    except OSError as error:
        if error.errno in _LOST:
            return False
        raise KernelError("inject a frame", error.errno or 0, error.strerror or "") from error
    return True


def statistics(capture: socket.socket) -> tuple[int, int]:
    """Frames (seen, dropped for want of buffer) since the last call: reading sets both to zero."""
    seen, dropped = struct.unpack("=II", capture.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    return seen, dropped


def filter_program(mac: bytes, addresses: Iterable[bytes]) -> list[tuple[int, int, int, int]]:
    """A classic BPF program: keeps frames to `mac`, ARP for the packed IPv4 and ND for the packed IPv6 `addresses`.

    Rows are (code, jump if true, jump if false, operand). Source: linux/filter.h, struct sock_filter.
    """
    packed = list(addresses)
    v4 = [int.from_bytes(one, "big") for one in packed if len(one) == 4][:_MAX_FILTERED]
    v6 = [int.from_bytes(one[-4:], "big") for one in packed if len(one) == 16][:_MAX_FILTERED]
    keep = (_RETURN, 0, 0, _WHOLE)
    drop = (_RETURN, 0, 0, 0)
    return [
        (_LOAD_WORD, 0, 0, 0),
        (_JUMP_EQUAL, 0, 3, int.from_bytes(mac[:4], "big")),
        (_LOAD_HALF, 0, 0, 4),
        (_JUMP_EQUAL, 0, 1, int.from_bytes(mac[4:], "big")),
        keep,
        (_LOAD_HALF, 0, 0, 12),
        (_JUMP_EQUAL, 0, len(v4) + 3, ETH_P_ARP),
        (_LOAD_WORD, 0, 0, 38),  # target protocol address
        *_one_of(v4),
        keep if len(v4) == _MAX_FILTERED else drop,
        keep,
        (_JUMP_EQUAL, 1, 0, ETH_P_IPV6),
        drop,
        (_LOAD_BYTE, 0, 0, 20),  # next header: ICMPv6
        (_JUMP_EQUAL, 1, 0, 58),
        drop,
        (_LOAD_BYTE, 0, 0, 54),  # type: neighbour solicitation
        (_JUMP_EQUAL, 1, 0, 135),
        drop,
        (_LOAD_WORD, 0, 0, 74),  # the last word of the target address
        *_one_of(v6),
        keep if len(v6) == _MAX_FILTERED else drop,
        keep,
    ]


def _one_of(values: list[int]) -> list[tuple[int, int, int, int]]:
    """Compare with each value; equal jumps past the row after the comparisons, else that row is reached."""
    return [(_JUMP_EQUAL, len(values) - number, 0, value) for number, value in enumerate(values)]


def _attach(capture: socket.socket, program: list[tuple[int, int, int, int]]) -> None:
    rows = b"".join(struct.pack("=HBBI", *row) for row in program)
    buffer = ctypes.create_string_buffer(rows, len(rows))
    capture.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(buffer)))
