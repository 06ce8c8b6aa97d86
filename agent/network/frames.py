"""Ethernet frames as pure functions: which are for a container, which are stale, and those that announce it.

A *captured* frame is what an AF_PACKET socket with PACKET_VNET_HDR gives and takes: a virtio_net_hdr of 10 bytes and
then the Ethernet frame. The header says whether a checksum is still to be computed and how a large frame is to be
cut; it travels with the frame, untouched. Frames that are built here (announcements) have no such header.
Source: packet(7); linux/virtio_net.h; RFC 826, 5227 (ARP), 4861 (neighbour discovery), 9293 (TCP).
"""

from __future__ import annotations

import ipaddress
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

VNET_HEADER_BYTES = 10
ETHERNET_BYTES = 14
BROADCAST = b"\xff" * 6

# linux/if_ether.h
ETH_P_IP = 0x0800
ETH_P_ARP = 0x0806
ETH_P_IPV6 = 0x86DD

_IPPROTO_TCP = 6
_IPPROTO_ICMPV6 = 58
_ICMP = (bytes([1]), bytes([_IPPROTO_ICMPV6]))
_NEIGHBOUR_SOLICITATION = 135
_NEIGHBOUR_ADVERTISEMENT = 136
_ARP_BYTES = 28
_IPV4_BYTES = 20
_IPV6_BYTES = 40
_TCP_BYTES = 20


class Connection(NamedTuple):
    """A TCP connection as the container sees it: addresses packed (4 or 16 bytes), ports as numbers."""

    local_address: bytes
    local_port: int
    remote_address: bytes
    remote_port: int


class Segment(NamedTuple):
    """What a TCP segment to the container says."""

    connection: Connection
    sequence: int
    data_bytes: int
    flags: int


def mac_bytes(mac: str) -> bytes:
    """'02:00:00:00:00:0a' as six bytes.

    Raises: ValueError: not a MAC address.
    """
    packed = bytes.fromhex(mac.replace(":", ""))
    if len(packed) != len(BROADCAST):
        message = f"{mac!r} is not a MAC address of six bytes"
        raise ValueError(message)
    return packed


def mac_text(mac: bytes) -> str:
    return mac.hex(":")


def is_for_container(frame: bytes, macs: frozenset[bytes], addresses: frozenset[bytes]) -> bool:
    """Whether a captured frame is to one of `macs`, or asks (ARP, ND) for one of the packed `addresses`.

    A frame that claims to come from the container itself never is.
    """
    ethernet = frame[VNET_HEADER_BYTES : VNET_HEADER_BYTES + ETHERNET_BYTES]
    if len(ethernet) < ETHERNET_BYTES or ethernet[6:12] in macs:
        return False
    if ethernet[:6] in macs:
        return True
    payload = frame[VNET_HEADER_BYTES + ETHERNET_BYTES :]
    protocol = int.from_bytes(ethernet[12:14], "big")
    if protocol == ETH_P_ARP:
        return len(payload) >= _ARP_BYTES and payload[24:28] in addresses
    if protocol == ETH_P_IPV6:
        is_solicitation = (
            len(payload) >= _IPV6_BYTES + 24
            and payload[6] == _IPPROTO_ICMPV6
            and payload[_IPV6_BYTES] == _NEIGHBOUR_SOLICITATION
        )
        return is_solicitation and payload[_IPV6_BYTES + 8 : _IPV6_BYTES + 24] in addresses
    return False


def tcp_segment(frame: bytes) -> Segment | None:
    """The TCP segment in a captured frame; None for anything else, fragments and IPv6 extension headers too."""
    start = VNET_HEADER_BYTES + ETHERNET_BYTES
    if len(frame) < start + _IPV4_BYTES:
        return None
    protocol = int.from_bytes(frame[start - 2 : start], "big")
    if protocol == ETH_P_IP:
        header_bytes = (frame[start] & 0x0F) * 4
        total_bytes, _, fragment = struct.unpack_from(">HHH", frame, start + 2)
        if frame[start + 9] != _IPPROTO_TCP or fragment & 0x3FFF:
            return None
        source, destination = frame[start + 12 : start + 16], frame[start + 16 : start + 20]
    elif protocol == ETH_P_IPV6 and len(frame) >= start + _IPV6_BYTES and frame[start + 6] == _IPPROTO_TCP:
        header_bytes = _IPV6_BYTES
        total_bytes = int.from_bytes(frame[start + 4 : start + 6], "big")
        total_bytes += _IPV6_BYTES if total_bytes else 0
        source, destination = frame[start + 8 : start + 24], frame[start + 24 : start + 40]
    else:
        return None
    # A large frame above 64 KiB (BIG TCP) has length 0 in its IP header.
    total_bytes = total_bytes or len(frame) - start
    tcp = start + header_bytes
    if len(frame) < tcp + _TCP_BYTES:
        return None
    source_port, destination_port, sequence, _, offset, flags = struct.unpack_from(">HHIIBB", frame, tcp)
    data_bytes = total_bytes - header_bytes - (offset >> 4) * 4
    if data_bytes < 0:
        return None
    return Segment(Connection(destination, destination_port, source, source_port), sequence, data_bytes, flags)


def is_stale_segment(frame: bytes, receive_next: Mapping[Connection, int]) -> bool:
    """Whether a captured frame carries only TCP data that the dumped socket already has.

    `receive_next` is rcv_nxt of each dumped connection. Pure acknowledgements are never stale: they move the window.
    A segment of an unknown connection is not stale either.
    """
    segment = tcp_segment(frame)
    if segment is None or segment.data_bytes == 0:
        return False
    expected = receive_next.get(segment.connection)
    if expected is None:
        return False
    beyond = (segment.sequence + segment.data_bytes - expected) & 0xFFFFFFFF
    return beyond == 0 or beyond >= 1 << 31  # sequence numbers wrap: compare as signed 32 bits


def is_answered_at_once(frame: bytes, connections: Container[Connection]) -> bool:
    """Whether the container's kernel answers a captured frame by itself, though all tasks stand still.

    Such a frame (ARP, ND, ping, the first segment of a new connection) is to be delivered after the port is attached,
    else the answer is lost and the sender waits for its timer. All others, segments of the dumped `connections` above
    all, are to be delivered before: newer ones must not overtake them.
    """
    start = VNET_HEADER_BYTES + ETHERNET_BYTES
    protocol = int.from_bytes(frame[start - 2 : start], "big")
    if protocol == ETH_P_ARP:
        return True
    if protocol == ETH_P_IP:
        carried = frame[start + 9 : start + 10]
    elif protocol == ETH_P_IPV6:
        carried = frame[start + 6 : start + 7]
    else:
        return False
    if carried == bytes([_IPPROTO_TCP]):
        segment = tcp_segment(frame)
        return segment is not None and segment.connection not in connections
    return carried in _ICMP


def gratuitous_arp(mac: bytes, address: bytes) -> bytes:
    """An ARP announcement (RFC 5227) of a packed IPv4 address, as an Ethernet frame without virtio header."""
    arp = struct.pack(">HHBBH", 1, ETH_P_IP, 6, 4, 1) + mac + address + b"\x00" * 6 + address
    return (BROADCAST + mac + ETH_P_ARP.to_bytes(2, "big") + arp).ljust(60, b"\x00")


def unsolicited_advertisement(mac: bytes, address: bytes) -> bytes:
    """An unsolicited neighbour advertisement with the override flag for a packed IPv6 address, to all nodes."""
    all_nodes = ipaddress.IPv6Address("ff02::1").packed
    target_link_address = struct.pack("BB", 2, 1) + mac
    body = struct.pack(">BBHI", _NEIGHBOUR_ADVERTISEMENT, 0, 0, 0x20000000) + address + target_link_address
    pseudo = address + all_nodes + struct.pack(">II", len(body), _IPPROTO_ICMPV6)
    body = body[:2] + _checksum(pseudo + body).to_bytes(2, "big") + body[4:]
    header = struct.pack(">IHBB", 6 << 28, len(body), _IPPROTO_ICMPV6, 255) + address + all_nodes
    return b"\x33\x33\x00\x00\x00\x01" + mac + ETH_P_IPV6.to_bytes(2, "big") + header + body


def announcements(mac: bytes, addresses: Iterable[bytes]) -> list[bytes]:
    """One Ethernet frame for each packed address that tells the whole segment where it is now."""
    return [
        gratuitous_arp(mac, address) if len(address) == len(b"IPv4") else unsolicited_advertisement(mac, address)
        for address in addresses
    ]


def _checksum(data: bytes) -> int:
    """Source: RFC 1071. Only even lengths are needed here."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    total += total >> 16
    return 0xFFFF - (total & 0xFFFF)
