"""Whether and how a batch of pages is packed before it is sent.

`auto` chooses by cost, in seconds a raw byte: sending raw costs 1/L, a compressor that packs C bytes a second
down to a share r of them costs 1/C + r/L. L, the link's rate, is measured over what was sent; C and r are
measured on a sample of every sixteenth batch. So a fast link is left alone, a slow one gets the densest that is worth
its time, and what does not compress is sent as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lz4.block
import zstandard

from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.pages import PageBatch, PageCodec

MODES = ("none", "lz4", "zstd", "auto")
Buffer = bytes | bytearray | memoryview

_SAMPLE_BYTES = 128 << 10
_SAMPLE_EVERY_BATCHES = 16
# Packing has to save a tenth of the time: estimates are rough, and the target spends time on unpacking.
_WORTH = 0.9
# A batch that did not shrink by a twentieth goes raw: unpacking it would gain nothing.
_SHRUNK = 0.95
# Weight of the newest batch in the link's rate.
_RATE_WEIGHT = 0.1
# Level 1: at the rate of a 1 Gbit/s link; higher levels pay off only below 100 Mbit/s.
_ZSTD_LEVEL = 1


class Compressor:
    """Packs batches on the source. One thread only."""

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise LocalProtocolError(f"unknown compression {mode!r}: one of {', '.join(MODES)}")
        self._mode = mode
        zstd = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True)
        self._pack: dict[PageCodec, Callable[[Buffer], bytes]] = {
            PageCodec.LZ4: _lz4_pack,
            PageCodec.ZSTD: zstd.compress,
        }
        self._link_bytes_s = 0.0
        self._until_sample = 0
        self._choice = {"lz4": PageCodec.LZ4, "zstd": PageCodec.ZSTD}.get(mode, PageCodec.RAW)

    def note_sent(self, wire_bytes: int, spent_s: float) -> None:
        """The link took `wire_bytes` in `spent_s`, waiting for room or for the bandwidth limit included."""
        if spent_s <= 0 or wire_bytes == 0:
            return
        rate = wire_bytes / spent_s
        if self._link_bytes_s:
            # Times are what adds up, so it is the mean of their reciprocals that is kept.
            rate = 1 / ((1 - _RATE_WEIGHT) / self._link_bytes_s + _RATE_WEIGHT / rate)
        self._link_bytes_s = rate

    def pack(self, data: Buffer) -> tuple[PageCodec, Buffer]:
        """The codec for this batch and its data, packed; raw where that is better."""
        if self._mode == "auto":
            self._until_sample -= 1
            if self._until_sample < 0:
                self._until_sample = _SAMPLE_EVERY_BATCHES
                self._choice = self._choose(memoryview(data)[:_SAMPLE_BYTES])
        if self._choice is PageCodec.RAW:
            return PageCodec.RAW, data
        packed = self._pack[self._choice](data)
        if len(packed) > len(data) * _SHRUNK:
            return PageCodec.RAW, data
        return self._choice, packed

    def _choose(self, sample: memoryview) -> PageCodec:
        """The cheapest codec for data like `sample`."""
        if self._link_bytes_s == 0:
            return PageCodec.RAW
        best, best_cost = PageCodec.RAW, _WORTH / self._link_bytes_s
        for codec, pack in self._pack.items():
            start_s = time.perf_counter()
            ratio = len(pack(sample)) / len(sample)
            cost = (time.perf_counter() - start_s) / len(sample) + ratio / self._link_bytes_s
            if cost < best_cost:
                best, best_cost = codec, cost
        return best


class Decompressor:
    """Unpacks batches on the target. Never makes more than the batch says."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor()

    def unpack(self, batch: PageBatch) -> Buffer:
        """The raw pages of `batch`. Raises: RemoteProtocolError: the data is not what its header says."""
        try:
            match batch.codec:
                case PageCodec.LZ4:
                    raw: Buffer = lz4.block.decompress(batch.data, uncompressed_size=batch.raw_bytes)
                case PageCodec.ZSTD:
                    raw = self._unpack_zstd(batch)
                case _:
                    raw = batch.data
        except (lz4.block.LZ4BlockError, zstandard.ZstdError, ValueError) as error:
            raise RemoteProtocolError(f"a page batch of task {batch.task} cannot be unpacked: {error}") from error
        if len(raw) != batch.raw_bytes:
            raise RemoteProtocolError(f"a page batch unpacks to {len(raw)} bytes, its header says {batch.raw_bytes}")
        return raw

    def _unpack_zstd(self, batch: PageBatch) -> bytes:
        # The frame's own size is believed by the library, and memory taken for it: look at it first.
        size = zstandard.frame_content_size(batch.data)
        if size != batch.raw_bytes:
            raise RemoteProtocolError(f"a zstd frame of {size} bytes in a batch of {batch.raw_bytes}")
        return self._zstd.decompress(batch.data)


def _lz4_pack(data: Buffer) -> bytes:
    packed: Any = lz4.block.compress(data, store_size=False)
    return bytes(packed)
