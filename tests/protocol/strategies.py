"""Hypothesis strategies for every message type, made from the types themselves: a new message is tested at once."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from protocol import link_messages, messages

CONTROL_TYPES: tuple[type[messages.Message], ...] = (messages.Request, messages.Reply, messages.Notice)
LINK_TYPES: tuple[type[messages.Message], ...] = link_messages.LinkMessage.__args__
REQUEST_BODIES: tuple[type[messages.Message], ...] = messages.RequestBody.__args__
REPLY_BODIES: tuple[type[messages.Message], ...] = messages.ReplyBody.__args__

# msgpack has 64 bits: negative to -2**63, positive to 2**64 - 1.
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1


@functools.cache
def records(record_type: Any) -> st.SearchStrategy[Any]:
    """Any valid value of a message type, or of a union of them."""
    return _of(inspect.type_info(record_type))


def _of(info: inspect.Type) -> st.SearchStrategy[Any]:
    match info:
        case inspect.Metadata():
            return _of(info.type)
        case inspect.StructType():
            return st.deferred(lambda: _struct(info.cls))
        case inspect.UnionType():
            return st.one_of([_of(member) for member in info.types])
        case inspect.NoneType():
            return st.none()
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType():
            low = _INT_MIN if info.ge is None else int(info.ge)
            high = _INT_MAX if info.le is None else int(info.le)
            return st.integers(low, high)
        case inspect.FloatType():
            return st.floats(info.ge, info.le, allow_nan=False)
        case inspect.StrType(pattern=str() as pattern):
            return st.from_regex(pattern).filter(lambda text: len(text) <= (info.max_length or len(text)))
        case inspect.StrType():
            return st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
        case inspect.BytesType():
            return st.binary(max_size=16)
        case inspect.ListType():
            return st.lists(_of(info.item_type), max_size=3)
        case inspect.DictType():
            return st.dictionaries(_of(info.key_type), _of(info.value_type), max_size=3)
        case _:
            raise NotImplementedError(f"a message has a field of type {info}")


@functools.cache
def _struct(struct_type: type[msgspec.Struct]) -> st.SearchStrategy[msgspec.Struct]:
    info = inspect.type_info(struct_type)
    assert isinstance(info, inspect.StructType)
    required = {field.name: _of(field.type) for field in info.fields if field.required}
    optional = {field.name: _of(field.type) for field in info.fields if not field.required}
    return st.fixed_dictionaries(required, optional=optional).map(lambda values: info.cls(**values))
