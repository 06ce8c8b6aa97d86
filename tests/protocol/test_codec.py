from __future__ import annotations

import math

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import codec, link_messages, messages
from protocol.errors import LocalProtocolError, RemoteProtocolError
from tests.protocol.strategies import CONTROL_TYPES, LINK_TYPES, REPLY_BODIES, REQUEST_BODIES, records

BODIES = [*REQUEST_BODIES, *REPLY_BODIES, messages.Progress, *LINK_TYPES]
few = settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.binary(), inner, max_size=3),
    max_leaves=10,
)


def decode_or_remote_error(data, record_type):
    try:
        return codec.decode(data, record_type)
    except RemoteProtocolError:
        return None


@pytest.mark.parametrize("message_type", BODIES, ids=lambda cls: cls.__name__)
@few
@given(data=st.data())
def test_every_message_type_comes_back_as_it_was_sent(message_type, data):
    message = data.draw(records(message_type))
    assert codec.decode(codec.encode(message), message_type) == message


@pytest.mark.parametrize("message_type", [*CONTROL_TYPES, *LINK_TYPES], ids=lambda cls: cls.__name__)
@few
@given(data=st.data())
def test_a_union_tells_its_members_apart(message_type, data):
    message = data.draw(records(message_type))
    union = messages.Control if message_type in CONTROL_TYPES else link_messages.LinkMessage
    assert codec.decode(codec.encode(message), union) == message


@pytest.mark.parametrize("message_type", BODIES, ids=lambda cls: cls.__name__)
@few
@given(data=st.data())
def test_a_message_that_lost_its_end_is_refused(message_type, data):
    encoded = codec.encode(data.draw(records(message_type)))
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(RemoteProtocolError):
        codec.decode(encoded[:cut], message_type)


@pytest.mark.parametrize("message_type", BODIES, ids=lambda cls: cls.__name__)
@few
@given(data=st.data(), tail=st.binary(min_size=1, max_size=9))
def test_a_message_with_bytes_behind_it_is_refused(message_type, data, tail):
    encoded = codec.encode(data.draw(records(message_type)))
    with pytest.raises(RemoteProtocolError):
        codec.decode(encoded + tail, message_type)


@pytest.mark.parametrize("message_type", BODIES, ids=lambda cls: cls.__name__)
@few
@given(data=st.data(), extra=plain)
def test_an_unknown_field_is_refused(message_type, data, extra):
    fields = msgpack.unpackb(codec.encode(data.draw(records(message_type))))
    with pytest.raises(RemoteProtocolError, match="unknown field"):
        codec.decode(msgpack.packb({**fields, "unheard_of": extra}), message_type)


@pytest.mark.parametrize("union", [messages.Control, link_messages.LinkMessage], ids=["control", "link"])
@given(data=st.data())
def test_a_message_with_one_changed_byte_gives_a_message_or_a_remote_error(union, data):
    encoded = bytearray(codec.encode(data.draw(records(union))))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= data.draw(st.integers(1, 255))
    decode_or_remote_error(bytes(encoded), union)


@given(garbage=st.binary(max_size=300))
def test_garbage_is_refused_with_a_remote_error(garbage):
    assert decode_or_remote_error(garbage, messages.Control) is None


@given(value=plain)
def test_well_formed_msgpack_of_another_shape_is_refused(value):
    with pytest.raises(RemoteProtocolError):
        codec.decode(msgpack.packb(value), messages.Control)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("migration", "abcd\n"),
        ("migration", "../x"),
        ("round", True),
        ("round", 1.0),
        ("round", "1"),
        ("round", -1),
        ("round", 1 << 63),
    ],
)
def test_a_field_of_a_wrong_type_or_range_is_refused_not_converted(field, value):
    fields = {"type": "RunRound", "migration": "abcd", "round": 1}
    codec.decode(msgpack.packb(fields), messages.RequestBody)
    with pytest.raises(RemoteProtocolError, match=field):
        codec.decode(msgpack.packb({**fields, field: value}), messages.RequestBody)


def test_not_a_number_is_no_time():
    fields = {"type": "CutOver", "migration": "abcd", "freeze_budget_s": math.nan}
    with pytest.raises(RemoteProtocolError, match="freeze_budget_s"):
        codec.decode(msgpack.packb(fields), messages.RequestBody)


def test_a_path_holds_no_null_byte():
    with pytest.raises(RemoteProtocolError):
        codec.decode(msgpack.packb({"path": "/a\0b", "size": 1, "digest": ""}), messages.FileIdentity)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x91" * 5000,  # nested arrays
        b"\xdd\x00\x10\x00\x00" * 400,  # arrays that claim 2**20 items each
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        msgpack.packb(msgpack.ExtType(1, b"1234")),
    ],
    ids=["deep", "wide-and-deep", "array", "map", "bytes", "text", "extension"],
)
def test_a_size_that_a_peer_claims_is_not_believed(bomb):
    with pytest.raises(RemoteProtocolError):
        codec.decode(bomb, messages.Control)


def test_a_message_over_the_limit_is_refused_unread():
    with pytest.raises(RemoteProtocolError, match="over"):
        codec.decode(bytes(codec.MAX_MESSAGE_BYTES + 1), messages.Control)


def test_what_msgpack_cannot_carry_is_our_own_error():
    reading = messages.ClockReading(monotonic_ns=1 << 70, boottime_ns=0, wall_ns=0)
    with pytest.raises(LocalProtocolError, match="ClockReply"):
        codec.encode(messages.ClockReply(reading=reading))
    with pytest.raises(LocalProtocolError, match="surrogates"):
        codec.encode(messages.Done(detail="\udc80"))


def test_bytes_stay_bytes_on_the_wire():
    network = messages.Network(kind="none")
    report = messages.ContainerReport(
        name="web1",
        runtime="runc",
        status="running",
        pid=1,
        bundle="/b",
        config_json=b"\xff\x00{}",
        memory_bytes=0,
        network=network,
    )
    assert msgpack.unpackb(codec.encode(report))["config_json"] == b"\xff\x00{}"


def test_every_request_has_exactly_one_answer_that_a_reply_may_carry():
    assert set(messages.ANSWERS) == set(REQUEST_BODIES)
    assert set(messages.ANSWERS.values()) | {messages.Failure} == set(REPLY_BODIES)
