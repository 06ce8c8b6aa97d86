"""Packets caught on the source while the container is cut off, and put into it on the target, or back.

A packet is what an AF_PACKET socket with PACKET_VNET_HDR gives: a virtio header of ten bytes, then the frame.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address

from agent.network import capture
from agent.network.frames import (
    ETHERNET_BYTES,
    VNET_HEADER_BYTES,
    Connection,
    is_answered_at_once,
    is_stale_segment,
)
from protocol.errors import RemoteProtocolError

# A second of 100 Mbit/s, or of 20,000 small requests: a freeze is a hundredth of that.
MAX_HELD_BYTES = 16 << 20
MAX_HELD_PACKETS = 20_000


class PacketHold:
    """Packets kept in order, bounded; what does not fit is dropped and counted."""

    def __init__(self) -> None:
        self._packets: deque[bytes] = deque()
        self._bytes = 0
        self.dropped = 0

    def put(self, packet: bytes) -> None:
        if self._bytes + len(packet) > MAX_HELD_BYTES or len(self._packets) >= MAX_HELD_PACKETS:
            self.dropped += 1
            return
        self._packets.append(packet)
        self._bytes += len(packet)

    def take(self) -> deque[bytes]:
        """All of them, oldest first; nothing is held afterwards."""
        packets, self._packets, self._bytes = self._packets, deque(), 0
        return packets


class PacketSource:
    """Source: reads the catcher's sockets. Packets go to `send` as they come, and copies are kept for a roll-back."""

    def __init__(self, send: Callable[[Sequence[bytes]], None]) -> None:
        self._send = send
        self._forwarding: asyncio.TimerHandle | None = None  # set while packets are left in the sockets
        self._sockets: list[socket.socket] = []
        self._kept = PacketHold()
        self._back: socket.socket | None = None
        self.packets = 0
        self._kernel_dropped = 0

    def add(self, fd: int) -> None:
        """Capture on a socket that is ours from now."""
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        self._sockets.append(sock)
        if self._forwarding is None:
            asyncio.get_running_loop().add_reader(sock.fileno(), self._readable, sock)

    def hold(self, at_most_s: float) -> None:
        """Leave packets in the sockets until `forward`, or for that time: each would take a turn of the processor."""
        if self._forwarding is None:
            loop = asyncio.get_running_loop()
            self._forwarding = loop.call_later(at_most_s, self.forward)
            for sock in self._sockets:
                loop.remove_reader(sock.fileno())

    def forward(self) -> None:
        """Undo `hold`; idempotent."""
        if self._listen_again():
            for sock in self._sockets:
                self._readable(sock)

    def _listen_again(self) -> bool:
        if self._forwarding is None:
            return False
        self._forwarding.cancel()
        self._forwarding = None
        for sock in self._sockets:
            asyncio.get_running_loop().add_reader(sock.fileno(), self._readable, sock)
        return True

    def replay_into(self, fd: int) -> int:
        """Put every kept packet back through a socket that is ours from now, and whatever comes later."""
        if self._back is not None:
            self._back.close()
        self._back = socket.socket(fileno=fd)
        self._listen_again()
        for sock in self._sockets:
            for packet in self._drain(sock):
                self._kept.put(packet)
        return sum(capture.inject(self._back, packet) for packet in self._kept.take())

    @property
    def dropped(self) -> int:
        """By the kernel for want of a buffer, and those of which no copy was kept."""
        for sock in self._sockets:
            self._kernel_dropped += capture.statistics(sock)[1]
        return self._kernel_dropped + self._kept.dropped

    def close(self) -> None:
        if self._forwarding is not None:
            self._forwarding.cancel()
            self._forwarding = None
        for sock in self._sockets:
            asyncio.get_running_loop().remove_reader(sock.fileno())
            sock.close()
        self._sockets.clear()
        if self._back is not None:
            self._back.close()

    def _drain(self, sock: socket.socket) -> Iterator[bytes]:
        for packet in capture.drain(sock):
            if len(packet) >= VNET_HEADER_BYTES + ETHERNET_BYTES:
                self.packets += 1
                yield packet

    def _readable(self, sock: socket.socket) -> None:
        packets = list(self._drain(sock))
        if self._back is not None:
            for packet in packets:
                capture.inject(self._back, packet)
            return
        for packet in packets:
            self._kept.put(packet)
        self._send(packets)


class PacketSink:
    """Target: holds what comes, and puts it into the container in order, in two steps.

    When the sockets are restored (`release`) segments of their connections and datagrams go in. What the container's
    kernel would answer at once (ARP, ICMP, the SYN of a new connection) waits until it is on the network (`attached`):
    before, the answer would be lost, and the sender waits a second for the next try.
    """

    def __init__(self) -> None:
        self._held = PacketHold()
        self._socket: socket.socket | None = None
        self._receive_next: Mapping[Connection, int] | None = None
        self._is_attached = False
        self.packets = 0
        self._lost = 0

    def set_socket(self, fd: int) -> None:
        """The socket into the container, ours from now."""
        if self._socket is not None:
            self._socket.close()
        self._socket = socket.socket(fileno=fd)
        self._flush()

    def release(self, receive_next: Mapping[str, int]) -> None:
        """The sockets are restored; data that they have already is left out."""
        self._receive_next = {_connection(text): number for text, number in receive_next.items()}
        self._flush()

    def attached(self) -> None:
        """The container is on the network: everything goes in from now on."""
        self._is_attached = True
        self._flush()

    def put(self, packet: bytes) -> None:
        if len(packet) < VNET_HEADER_BYTES + ETHERNET_BYTES:
            raise RemoteProtocolError(f"a packet of {len(packet)} bytes has no Ethernet header")
        self.packets += 1
        if not self._inject(packet):
            self._held.put(packet)

    @property
    def dropped(self) -> int:
        return self._held.dropped + self._lost

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _inject(self, packet: bytes) -> bool:
        """False: it has to wait."""
        if self._socket is None or self._receive_next is None:
            return False
        if not self._is_attached and is_answered_at_once(packet, self._receive_next):
            return False
        if not is_stale_segment(packet, self._receive_next):
            self._lost += not capture.inject(self._socket, packet)
        return True

    def _flush(self) -> None:
        for packet in self._held.take():
            if not self._inject(packet):
                self._held.put(packet)


def _connection(text: str) -> Connection:
    """'LOCAL_IP LOCAL_PORT PEER_IP PEER_PORT' as the frames have it. Raises: RemoteProtocolError."""
    try:
        local, local_port, peer, peer_port = text.split(" ")
        return Connection(ip_address(local).packed, int(local_port), ip_address(peer).packed, int(peer_port))
    except ValueError as error:
        raise RemoteProtocolError(f"{text!r} does not name a connection") from error
