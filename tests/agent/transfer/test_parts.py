"""The pure parts of the stream."""

from __future__ import annotations

import os

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from agent.transfer.compression import Compressor, Decompressor
from agent.transfer.memory import cut_runs, split_zero
from agent.transfer.packets import MAX_HELD_BYTES, MAX_HELD_PACKETS, PacketHold
from agent.transfer.ratelimit import TokenBucket
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.pages import PAGE_BYTES, PageBatch, PageCodec

MIB = 1 << 20
TEXT = b"".join(b"%d: some words that repeat\n" % number for number in range(60_000))[:MIB]
RUNS = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)), max_size=20)


@given(RUNS, st.integers(1, 16))
def test_batches_hold_every_page_once_and_in_order(runs, batch_pages):
    starts = [start * PAGE_BYTES for start, _ in runs]
    sizes = [size * PAGE_BYTES for _, size in runs]
    batches = list(cut_runs(starts, sizes, batch_pages * PAGE_BYTES))
    pages = [page for batch in batches for start, size in batch for page in range(start, start + size, PAGE_BYTES)]
    assert pages == [
        page for start, size in zip(starts, sizes, strict=True) for page in range(start, start + size, PAGE_BYTES)
    ]
    for batch in batches:
        assert 0 < sum(size for _, size in batch) <= batch_pages * PAGE_BYTES
        ends = [start + size for start, size in batch]
        assert all(end < start for end, (start, _) in zip(ends, batch[1:], strict=False))


@given(st.lists(st.sampled_from(["zero", "full", "first", "last", "between"]), min_size=1, max_size=40), st.data())
def test_zero_pages_are_told_from_all_others(kinds, data):
    contents = {
        "zero": bytes(PAGE_BYTES),
        "full": b"\xff" * PAGE_BYTES,
        "first": b"\x01" + bytes(PAGE_BYTES - 1),
        "last": bytes(PAGE_BYTES - 1) + b"\x01",
        "between": bytes(1000) + b"\x01" + bytes(PAGE_BYTES - 1001),
    }
    gaps = data.draw(st.lists(st.integers(0, 1), min_size=len(kinds), max_size=len(kinds)))
    addresses, at = [], 0x10000
    for gap in gaps:
        at += (gap + 1) * PAGE_BYTES
        addresses.append(at)
    runs = next(cut_runs(addresses, [PAGE_BYTES] * len(addresses), MIB))
    full_runs, zero_runs, left = split_zero(runs, memoryview(b"".join(contents[kind] for kind in kinds)))
    assert bytes(left) == b"".join(contents[kind] for kind in kinds if kind != "zero")
    for wanted, found in ((False, full_runs), (True, zero_runs)):
        pages = [page for start, size in found for page in range(start, start + size, PAGE_BYTES)]
        assert pages == [a for a, kind in zip(addresses, kinds, strict=True) if (kind == "zero") is wanted]


@pytest.mark.parametrize("mode", ["lz4", "zstd"])
@pytest.mark.parametrize("data", [TEXT, os.urandom(MIB)])
def test_packed_pages_unpack_to_the_same(mode, data):
    codec, packed = Compressor(mode).pack(memoryview(data))
    assert codec is (PageCodec[mode.upper()] if data is TEXT else PageCodec.RAW)
    batch = PageBatch(task=1, runs=[(0, len(data))], codec=codec, raw_bytes=len(data), data=memoryview(packed))
    assert bytes(Decompressor().unpack(batch)) == data


def test_auto_leaves_a_fast_link_alone():
    compressor = Compressor("auto")
    compressor.note_sent(100 << 30, 1.0)
    assert compressor.pack(TEXT)[0] is PageCodec.RAW


def test_auto_packs_for_a_slow_link_what_can_be_packed():
    compressor = Compressor("auto")
    compressor.note_sent(MIB, 1.0)
    assert compressor.pack(TEXT)[0] is not PageCodec.RAW
    other = Compressor("auto")
    other.note_sent(MIB, 1.0)
    assert other.pack(os.urandom(MIB))[0] is PageCodec.RAW


def test_an_unknown_compression_is_refused():
    with pytest.raises(LocalProtocolError, match="none, lz4, zstd, auto"):
        Compressor("gzip")


@pytest.mark.parametrize(
    ("codec", "data"),
    [
        (PageCodec.LZ4, b"\xff" * 100),
        (PageCodec.LZ4, lz4.block.compress(bytes(2 * PAGE_BYTES), store_size=False)),
        (PageCodec.LZ4, lz4.block.compress(bytes(100), store_size=False)),
        (PageCodec.ZSTD, b"\xff" * 100),
        (PageCodec.ZSTD, zstandard.compress(bytes(1 << 30))),
        (PageCodec.ZSTD, zstandard.compress(bytes(100))),
    ],
)
def test_data_that_does_not_unpack_to_what_its_header_says_is_refused(codec, data):
    with pytest.raises(RemoteProtocolError):
        Decompressor().unpack(PageBatch(task=1, runs=[(0, PAGE_BYTES)], codec=codec, raw_bytes=PAGE_BYTES, data=data))


def test_the_bucket_keeps_its_rate_on_average():
    now_s, sent = 100.0, 0
    bucket = TokenBucket(1000, now_s)
    while now_s < 110:
        now_s += bucket.spend(100, now_s)
        sent += 100
    assert 9900 <= sent <= 10_200


def test_a_bucket_of_rate_zero_never_waits():
    assert TokenBucket(0, 0.0).spend(1 << 40, 0.0) == 0


def test_a_hold_is_bounded_in_packets_and_bytes():
    hold = PacketHold()
    for _ in range(MAX_HELD_PACKETS + 5):
        hold.put(b"x")
    assert (len(hold.take()), hold.dropped) == (MAX_HELD_PACKETS, 5)
    hold.put(bytes(MAX_HELD_BYTES))
    hold.put(b"x")
    assert (len(hold.take()), hold.dropped) == (1, 6)
    hold.put(b"y")
    assert list(hold.take()) == [b"y"]
