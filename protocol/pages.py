"""The page stream's batch: runs of pages of one task, and their contents.

Payload of a PAGES frame:

    header   >IBII   task, codec, number of runs, raw bytes; raw bytes is in units of pages for ZERO
    runs     <QQ     address and size of each, bytes, both in whole pages; ascending, not overlapping
    data             contents of all runs one behind the other, as the codec says; nothing for ZERO

Both directions refuse a batch out of bounds, so that a receiver writes only where a sender could have read.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.errors import LocalProtocolError, RemoteProtocolError

PAGE_BYTES = 4096
HEADER = struct.Struct(">IBII")
RUN_BYTES = 16
MAX_RUNS = 4096  # A table of 64 KiB: a batch that is full of single pages has 1024.
MAX_RAW_BYTES = 4 << 20  # A batch is 1 MiB, or one huge page of 2 MiB; the receiver holds one decompressed.
MAX_ZERO_BYTES = 1 << 40  # Nothing is held for it: the receiver drops the range.
MAX_ADDRESS = 1 << 47  # End of user space, x86-64 with four levels of page tables.
# What the compressors may add to what cannot be compressed (LZ4_COMPRESSBOUND: n/255 + 16, ZSTD_COMPRESSBOUND:
# n/256 + 64) and the header of a frame of theirs.
MAX_EXPANSION_BYTES = MAX_RAW_BYTES // 255 + 256

_PAGE_MASK = PAGE_BYTES - 1


class PageCodec(enum.IntEnum):
    """How the data of a batch is packed."""

    RAW = 0
    LZ4 = 1
    ZSTD = 2
    ZERO = 3  # pages that read as zero: no data


@dataclass(frozen=True, slots=True)
class PageBatch:
    """Pages of one task. `runs` are (address, size in bytes); `data` may be a view into what was received."""

    task: int
    runs: Sequence[tuple[int, int]]
    codec: PageCodec
    raw_bytes: int
    data: bytes | bytearray | memoryview


def encode_batch(batch: PageBatch) -> list[bytes | bytearray | memoryview]:
    """Header with run table, then the data itself, not copied: the parts of one PAGES payload.

    Raises: LocalProtocolError: the batch is out of bounds.
    """
    problem = _problem(batch)
    if problem is not None:
        raise LocalProtocolError(f"a page batch for task {batch.task}: {problem}")
    count = len(batch.runs)
    scale = PAGE_BYTES if batch.codec is PageCodec.ZERO else 1
    flat = [value for run in batch.runs for value in run]
    try:
        head = HEADER.pack(batch.task, batch.codec, count, batch.raw_bytes // scale)
        head += struct.pack(f"<{2 * count}Q", *flat)
    except struct.error as error:
        raise LocalProtocolError(f"a page batch for task {batch.task}: {error}") from error
    return [head, batch.data] if len(batch.data) else [head]


def decode_batch(payload: bytes | memoryview) -> PageBatch:
    """The batch in `payload`; its `data` is a view into it, good for as long as the payload.

    Raises: RemoteProtocolError: it is cut or out of bounds.
    """
    view = memoryview(payload)
    if len(view) < HEADER.size:
        raise RemoteProtocolError(f"a page batch of {len(view)} bytes is shorter than its header")
    task, codec_number, count, units = HEADER.unpack_from(view)
    try:
        codec = PageCodec(codec_number)
    except ValueError as error:
        raise RemoteProtocolError(f"a page batch with unknown codec {codec_number}") from error
    data_start = HEADER.size + count * RUN_BYTES
    if count > MAX_RUNS or len(view) < data_start:
        raise RemoteProtocolError(f"a page batch of {len(view)} bytes cannot hold {count} runs (limit {MAX_RUNS})")
    flat = struct.unpack_from(f"<{2 * count}Q", view, HEADER.size)
    batch = PageBatch(
        task=task,
        runs=list(zip(flat[::2], flat[1::2], strict=True)),
        codec=codec,
        raw_bytes=units * PAGE_BYTES if codec is PageCodec.ZERO else units,
        data=view[data_start:],
    )
    problem = _problem(batch)
    if problem is not None:
        raise RemoteProtocolError(f"a page batch for task {task}: {problem}")
    return batch


def _problem(batch: PageBatch) -> str | None:
    """What is out of bounds; None: nothing."""
    if not 1 <= len(batch.runs) <= MAX_RUNS:
        return f"{len(batch.runs)} runs, not 1 to {MAX_RUNS}"
    end = total = misaligned = 0
    for start, size in batch.runs:
        if start < end or size <= 0:
            return f"run {start:#x} + {size:#x} is empty, or not behind the one before, which ends at {end:#x}"
        misaligned |= start | size
        end = start + size
        total += size
    if misaligned & _PAGE_MASK:
        return f"a run is not aligned to pages of {PAGE_BYTES} bytes"
    if end > MAX_ADDRESS:
        return f"the last run ends at {end:#x}, over {MAX_ADDRESS:#x}"
    if total != batch.raw_bytes:
        return f"the runs have {total} bytes, the header says {batch.raw_bytes}"
    return _data_problem(batch)


def _data_problem(batch: PageBatch) -> str | None:
    size, raw = len(batch.data), batch.raw_bytes
    limit = MAX_ZERO_BYTES if batch.codec is PageCodec.ZERO else MAX_RAW_BYTES
    if raw > limit:
        return f"{raw} bytes are over {limit}"
    match batch.codec:
        case PageCodec.ZERO:
            fits = size == 0
        case PageCodec.RAW:
            fits = size == raw
        case PageCodec.LZ4 | PageCodec.ZSTD:
            fits = 0 < size <= raw + MAX_EXPANSION_BYTES
    return None if fits else f"{size} bytes of {batch.codec.name} data cannot stand for {raw} bytes"
