from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.network.frames import (
    VNET_HEADER_BYTES,
    Connection,
    announcements,
    gratuitous_arp,
    is_answered_at_once,
    is_for_container,
    is_stale_segment,
    mac_bytes,
    mac_text,
    tcp_segment,
    unsolicited_advertisement,
)

HEADER = bytes(VNET_HEADER_BYTES)
MINE, OTHER = mac_bytes("02:00:00:00:00:50"), mac_bytes("02:00:00:00:00:09")
MACS = frozenset({MINE})
V4, V6 = ipaddress.ip_address("10.77.0.50").packed, ipaddress.ip_address("fd77::50").packed
PEER4, PEER6 = ipaddress.ip_address("10.77.0.9").packed, ipaddress.ip_address("fd77::9").packed
ADDRESSES = frozenset({V4, V6})


def segment(sequence: int, data: bytes, *, version: int = 4, flags: int = 0x10, fragment: int = 0) -> bytes:
    tcp = struct.pack(">HHIIBBHHH", 40000, 6379, sequence, 0, 5 << 4, flags, 0, 0, 0) + data
    if version == 4:
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, fragment, 64, 6, 0) + PEER4 + V4
        return HEADER + MINE + OTHER + b"\x08\x00" + ip + tcp
    return HEADER + MINE + OTHER + b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, len(tcp), 6, 64) + PEER6 + V6 + tcp


def arp_question(target: bytes) -> bytes:
    body = struct.pack(">HHBBH", 1, 0x800, 6, 4, 1) + OTHER + PEER4 + bytes(6) + target
    return HEADER + b"\xff" * 6 + OTHER + b"\x08\x06" + body


def solicitation(target: bytes) -> bytes:
    body = struct.pack(">BBHI", 135, 0, 0, 0) + target + b"\x01\x01" + OTHER
    group = ipaddress.ip_address("ff02::1:ff00:50").packed
    header = struct.pack(">IHBB", 6 << 28, len(body), 58, 255) + PEER6 + group
    return HEADER + b"\x33\x33\xff\x00\x00\x50" + OTHER + b"\x86\xdd" + header + body


def test_unicast_to_the_container_is_its_own() -> None:
    assert is_for_container(segment(1, b"x"), MACS, ADDRESSES)


def test_questions_for_its_addresses_are_its_own() -> None:
    assert is_for_container(arp_question(V4), MACS, ADDRESSES)
    assert is_for_container(solicitation(V6), MACS, ADDRESSES)


def test_questions_for_others_are_not() -> None:
    assert not is_for_container(arp_question(PEER4), MACS, ADDRESSES)
    assert not is_for_container(solicitation(PEER6), MACS, ADDRESSES)


def test_frames_to_or_from_others_are_not() -> None:
    assert not is_for_container(HEADER + OTHER + MINE + b"\x08\x00" + bytes(40), MACS, ADDRESSES)
    assert not is_for_container(HEADER + OTHER + OTHER + b"\x08\x00" + bytes(40), MACS, ADDRESSES)
    assert not is_for_container(HEADER + MINE + MINE + b"\x08\x00" + bytes(40), MACS, ADDRESSES)


@given(st.binary(max_size=120))
def test_any_bytes_are_a_frame_or_none(data: bytes) -> None:
    is_for_container(data, MACS, ADDRESSES)
    is_stale_segment(data, {})
    is_answered_at_once(data, {})
    tcp_segment(HEADER + MINE + OTHER + b"\x08\x00" + data)
    tcp_segment(HEADER + MINE + OTHER + b"\x86\xdd" + data)


@pytest.mark.parametrize("version", [4, 6])
def test_a_segment_is_read_with_the_containers_side_as_local(version: int) -> None:
    found = tcp_segment(segment(1000, b"hello", version=version))
    assert found is not None
    local, remote = (V4, PEER4) if version == 4 else (V6, PEER6)
    assert found.connection == Connection(local, 6379, remote, 40000)
    assert (found.sequence, found.data_bytes) == (1000, 5)


@pytest.mark.parametrize(
    ("sequence", "data", "is_stale"),
    [
        (990, b"0123456789", True),  # ends at rcv_nxt
        (980, b"0123456789", True),
        (991, b"0123456789", False),  # one new byte
        (1000, b"0123456789", False),
        (1000, b"", False),  # a pure acknowledgement
        (900, b"", False),
    ],
)
def test_only_data_that_is_there_already_is_stale(sequence: int, data: bytes, is_stale: bool) -> None:
    known = {Connection(V4, 6379, PEER4, 40000): 1000}
    assert is_stale_segment(segment(sequence, data), known) is is_stale


def test_staleness_holds_where_sequence_numbers_wrap() -> None:
    known = {Connection(V4, 6379, PEER4, 40000): 5}
    assert is_stale_segment(segment(0xFFFFFFF0, b"0123456789"), known)
    assert not is_stale_segment(segment(0xFFFFFFFE, b"0123456789"), known)


def test_what_the_kernel_answers_by_itself_waits_for_the_port() -> None:
    known = {Connection(V4, 6379, PEER4, 40000): 1000}
    ping = (
        HEADER
        + MINE
        + OTHER
        + b"\x08\x00"
        + struct.pack(">BBHHHBBH", 0x45, 0, 28, 0, 0, 64, 1, 0)
        + PEER4
        + V4
        + bytes(8)
    )
    datagram = ping[:33] + b"\x11" + ping[34:]
    assert is_answered_at_once(arp_question(V4), known)
    assert is_answered_at_once(solicitation(V6), known)
    assert is_answered_at_once(ping, known)
    assert is_answered_at_once(segment(1, b"", flags=2), {})
    assert not is_answered_at_once(segment(1, b"x"), known)
    assert not is_answered_at_once(datagram, known)


def test_segments_of_unknown_connections_and_fragments_are_kept() -> None:
    assert not is_stale_segment(segment(1, b"x"), {})
    assert not is_stale_segment(segment(1, b"x", fragment=0x2000), {Connection(V4, 6379, PEER4, 40000): 1000})


def test_padding_of_a_short_frame_is_not_data() -> None:
    known = {Connection(V4, 6379, PEER4, 40000): 1000}
    assert not is_stale_segment(segment(999, b"") + bytes(6), known)


def test_a_gratuitous_arp_names_the_address_twice() -> None:
    frame = gratuitous_arp(MINE, V4)
    assert frame[:6] == b"\xff" * 6
    assert frame[6:12] == frame[22:28] == MINE
    assert frame[28:32] == frame[38:42] == V4
    assert len(frame) == 60


def test_an_unsolicited_advertisement_has_a_right_checksum() -> None:
    frame = unsolicited_advertisement(MINE, V6)
    body = frame[54:]
    assert (body[0], body[4]) == (136, 0x20)
    pseudo = frame[22:54] + struct.pack(">II", len(body), 58) + body
    total = sum(struct.unpack(f">{len(pseudo) // 2}H", pseudo))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert total == 0xFFFF


def test_every_address_is_announced() -> None:
    assert announcements(MINE, [V4, V6]) == [gratuitous_arp(MINE, V4), unsolicited_advertisement(MINE, V6)]


def test_mac_addresses_keep_their_text() -> None:
    assert mac_text(mac_bytes("02:0a:ff:00:00:50")) == "02:0a:ff:00:00:50"
    with pytest.raises(ValueError, match="six bytes"):
        mac_bytes("02:00")
