from __future__ import annotations

import struct
import timeit
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.pages import (
    HEADER,
    MAX_ADDRESS,
    MAX_RAW_BYTES,
    MAX_RUNS,
    MAX_ZERO_BYTES,
    PAGE_BYTES,
    PageBatch,
    PageCodec,
    decode_batch,
    encode_batch,
)

BASE = 0x7F00_0000_0000


def joined(batch):
    return b"".join(encode_batch(batch))


@st.composite
def batches(draw):
    codec = draw(st.sampled_from(PageCodec))
    gaps_and_sizes = draw(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 16)), min_size=1, max_size=20))
    address, runs = 0, []
    for gap, size in gaps_and_sizes:
        address += gap * PAGE_BYTES
        runs.append((address, size * PAGE_BYTES))
        address += size * PAGE_BYTES
    raw_bytes = sum(size for _, size in runs)
    match codec:
        case PageCodec.ZERO:
            data = b""
        case PageCodec.RAW:
            data = draw(st.binary(min_size=1, max_size=1)) * raw_bytes
        case _:
            data = draw(st.binary(min_size=1, max_size=64))
    return PageBatch(draw(st.integers(0, (1 << 32) - 1)), runs, codec, raw_bytes, data)


def two_runs(**changes):
    runs = [(BASE, PAGE_BYTES), (BASE + 2 * PAGE_BYTES, PAGE_BYTES)]
    return replace(PageBatch(7, runs, PageCodec.RAW, 2 * PAGE_BYTES, bytes(2 * PAGE_BYTES)), **changes)


@given(batch=batches())
def test_a_batch_comes_back_as_it_was_sent(batch):
    assert decode_batch(memoryview(joined(batch))) == batch


@given(batch=batches(), data=st.data())
def test_a_batch_that_was_cut_is_refused_where_its_length_is_known(batch, data):
    payload = joined(batch)
    cut = data.draw(st.integers(0, len(payload) - 1))
    compressed_rest = batch.codec in {PageCodec.LZ4, PageCodec.ZSTD} and cut > len(payload) - len(batch.data)
    if compressed_rest:
        assert decode_batch(payload[:cut]).runs == batch.runs
    else:
        with pytest.raises(RemoteProtocolError):
            decode_batch(payload[:cut])


@given(batch=batches(), data=st.data())
def test_a_batch_with_a_changed_header_is_in_bounds_or_refused(batch, data):
    payload = bytearray(joined(batch))
    head = HEADER.size + 16 * len(batch.runs)
    payload[data.draw(st.integers(0, head - 1))] ^= data.draw(st.integers(1, 255))
    try:
        changed = decode_batch(bytes(payload))
    except RemoteProtocolError:
        return
    assert encode_batch(changed), "what is decoded keeps the rules that encoding enforces"


@given(garbage=st.binary(max_size=200))
def test_garbage_is_refused_with_a_remote_error(garbage):
    with pytest.raises(RemoteProtocolError):
        decode_batch(garbage)


def test_the_data_is_neither_copied_on_the_way_out_nor_in():
    batch = two_runs()
    parts = encode_batch(batch)
    assert parts[1] is batch.data
    payload = bytearray(b"".join(parts))
    with memoryview(payload) as view, decode_batch(view).data as data:  # type: ignore[union-attr]
        payload[-1] = 0x55
        assert data[-1] == 0x55


@pytest.mark.parametrize(
    "changes",
    [
        {"runs": [], "raw_bytes": 0, "data": b""},
        {"runs": [(BASE + 1, PAGE_BYTES), (BASE + 3 * PAGE_BYTES, PAGE_BYTES)]},
        {"runs": [(BASE, PAGE_BYTES - 8), (BASE + 2 * PAGE_BYTES, PAGE_BYTES + 8)]},
        {"runs": [(BASE, 0), (BASE, 2 * PAGE_BYTES)]},
        {"runs": [(BASE + PAGE_BYTES, PAGE_BYTES), (BASE, PAGE_BYTES)]},
        {"runs": [(BASE, PAGE_BYTES), (BASE, PAGE_BYTES)]},
        {"runs": [(BASE, PAGE_BYTES), (MAX_ADDRESS, PAGE_BYTES)]},
        {"raw_bytes": PAGE_BYTES, "data": bytes(PAGE_BYTES)},
        {"data": bytes(2 * PAGE_BYTES - 1)},
        {"data": b""},
        {"codec": PageCodec.ZERO},
        {"codec": PageCodec.LZ4, "data": b""},
        {"codec": PageCodec.ZSTD, "data": bytes(1 << 20)},
        {"runs": [(BASE, MAX_RAW_BYTES + PAGE_BYTES)], "raw_bytes": MAX_RAW_BYTES + PAGE_BYTES, "codec": PageCodec.LZ4},
        {"codec": PageCodec.ZERO, "data": b"", "runs": [(0, MAX_ZERO_BYTES * 2)], "raw_bytes": MAX_ZERO_BYTES * 2},
    ],
    ids=[
        "no-runs", "start-unaligned", "size-unaligned", "empty-run", "descending", "overlap", "over-the-top",
        "sum", "raw-short", "raw-none", "zero-with-data", "lz4-none", "zstd-too-long", "raw-too-many", "zero-too-many",
    ],
)  # fmt: skip
def test_a_batch_out_of_bounds_is_refused_by_both_ends(changes):
    bad = two_runs(**changes)
    with pytest.raises(LocalProtocolError):
        encode_batch(bad)
    scale = PAGE_BYTES if bad.codec is PageCodec.ZERO else 1
    table = b"".join(struct.pack("<QQ", *run) for run in bad.runs)
    head = HEADER.pack(bad.task, bad.codec, len(bad.runs), bad.raw_bytes // scale)
    with pytest.raises(RemoteProtocolError):
        decode_batch(head + table + bytes(bad.data))


def test_more_runs_than_the_limit_are_refused():
    count = MAX_RUNS + 1
    runs = [(index * PAGE_BYTES, PAGE_BYTES) for index in range(count)]
    with pytest.raises(LocalProtocolError):
        encode_batch(PageBatch(1, runs, PageCodec.ZERO, count * PAGE_BYTES, b""))
    with pytest.raises(RemoteProtocolError):
        decode_batch(HEADER.pack(1, PageCodec.ZERO, count, count) + bytes(16 * count))


def test_a_terabyte_of_zeros_is_one_small_batch():
    batch = PageBatch(1, [(0, MAX_ZERO_BYTES)], PageCodec.ZERO, MAX_ZERO_BYTES, b"")
    assert len(joined(batch)) == HEADER.size + 16
    assert decode_batch(joined(batch)) == batch


def test_an_unknown_codec_is_refused():
    with pytest.raises(RemoteProtocolError, match="codec 9"):
        decode_batch(HEADER.pack(1, 9, 1, PAGE_BYTES) + bytes(16 + PAGE_BYTES))


def test_a_task_number_over_32_bits_is_our_own_error():
    with pytest.raises(LocalProtocolError):
        encode_batch(two_runs(task=1 << 32))


def test_256_single_page_runs_decode_fast():
    runs = [(BASE + index * 2 * PAGE_BYTES, PAGE_BYTES) for index in range(256)]
    payload = memoryview(joined(PageBatch(7, runs, PageCodec.RAW, 1 << 20, bytes(1 << 20))))
    best_s = min(timeit.repeat(lambda: decode_batch(payload), number=50, repeat=10)) / 50
    assert best_s < 150e-6, "at 300 MiB/s there are 3.3 ms for a batch; the table may take a twentieth of it"
