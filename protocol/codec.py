"""Bytes to typed records and back: msgpack on the wire, msgspec for the types.

A bounded `msgpack.Unpacker` decodes, so that no size or count from a peer is believed; `msgspec.convert`
then insists on the declared type, field by field.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgpack
import msgspec

from protocol.errors import LocalProtocolError, RemoteProtocolError

T = TypeVar("T")

# Control messages and engine sections are a few KiB; a container with 10,000 areas has a layout of about 1 MiB.
MAX_MESSAGE_BYTES = 64 << 20
# One entry per memory area, thread or open file; 2**20 is the kernel's own limit on open files of a process.
MAX_ITEMS = 1 << 20


def encode(record: msgspec.Struct) -> bytes:
    """The record as one msgpack object.

    Raises: LocalProtocolError: it is too large, or holds what msgpack cannot (a number over 64 bits, a lone surrogate).
    """
    try:
        data: bytes = msgpack.packb(msgspec.to_builtins(record, builtin_types=(bytes, bytearray, memoryview)))
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"{type(record).__name__} cannot be encoded: {error}") from error
    if len(data) > MAX_MESSAGE_BYTES:
        raise LocalProtocolError(f"{type(record).__name__} of {len(data)} bytes is over {MAX_MESSAGE_BYTES}")
    return data


def decode(data: bytes | memoryview, record_type: type[T] | Any) -> T:
    """One record of `record_type` (a Struct, or a union of tagged Structs).

    Raises: RemoteProtocolError: not msgpack, too large, bytes left over, a wrong type or an unknown field.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"a message of {len(data)} bytes is over {MAX_MESSAGE_BYTES}")
    unpacker = msgpack.Unpacker(
        raw=False,
        strict_map_key=True,
        max_buffer_size=MAX_MESSAGE_BYTES,
        # An item takes a byte at least, and an array is allocated by its count alone, at every level.
        max_array_len=min(MAX_ITEMS, len(data)),
        max_map_len=min(MAX_ITEMS, len(data)),
        max_ext_len=0,
    )
    try:
        unpacker.feed(data)
        value = unpacker.unpack()
        if unpacker.tell() != len(data):
            raise RemoteProtocolError(f"{len(data) - unpacker.tell()} bytes left over behind a message")
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise RemoteProtocolError(f"not a msgpack message: {type(error).__name__} {error}".rstrip()) from error
    try:
        converted: T = msgspec.convert(value, record_type, builtin_types=(bytes, bytearray, memoryview))
    except msgspec.ValidationError as error:
        raise RemoteProtocolError(f"a message of the wrong shape: {error}") from error
    return converted
