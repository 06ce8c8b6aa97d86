from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.framing import HEADER, MAX_PAYLOAD_BYTES, Frame, FrameDecoder, FrameKind, encode_frame, frame_header

frames = st.lists(st.builds(Frame, st.sampled_from(FrameKind), st.binary(max_size=40)), max_size=8)


@given(frames=frames, data=st.data())
def test_any_cut_of_the_stream_gives_the_same_frames(frames, data):
    stream = b"".join(encode_frame(frame.kind, frame.payload) for frame in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    decoder = FrameDecoder()
    got: list[Frame] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += decoder.feed(stream[start:end])
    assert got == frames
    assert decoder.pending_bytes == 0


@given(frames=frames, data=st.data())
def test_a_stream_that_was_cut_leaves_pending_bytes_unless_between_frames(frames, data):
    pieces = [encode_frame(frame.kind, frame.payload) for frame in frames]
    stream = b"".join(pieces)
    cut = data.draw(st.integers(0, len(stream)))
    decoder = FrameDecoder()
    whole = list(decoder.feed(stream[:cut]))
    assert whole == frames[: len(whole)]
    assert decoder.pending_bytes == cut - sum(map(len, pieces[: len(whole)]))


@given(garbage=st.binary(max_size=200))
def test_garbage_gives_frames_or_a_remote_error_and_nothing_else(garbage):
    decoder = FrameDecoder(max_payload_bytes=64)
    try:
        for frame in decoder.feed(garbage):
            assert len(frame.payload) <= 64
    except RemoteProtocolError:
        pass


def test_good_frames_before_a_bad_one_are_given_first():
    decoder = FrameDecoder()
    feed = decoder.feed(encode_frame(FrameKind.PING, b"1") + b"\xff" * 5)
    assert next(feed) == Frame(FrameKind.PING, b"1")
    with pytest.raises(RemoteProtocolError):
        next(feed)


def test_the_text_of_a_shell_is_shown_in_the_error():
    with pytest.raises(RemoteProtocolError, match="migrate-agent: command not found"):
        list(FrameDecoder().feed(b"bash: migrate-agent: command not found\n"))


def test_a_payload_over_the_limit_is_refused_by_its_header_alone():
    with pytest.raises(RemoteProtocolError, match="over 100"):
        list(FrameDecoder(max_payload_bytes=100).feed(HEADER.pack(FrameKind.CONTROL, 101)))


def test_a_payload_over_the_limit_is_not_sent():
    with pytest.raises(LocalProtocolError):
        frame_header(FrameKind.SECTION, MAX_PAYLOAD_BYTES + 1)


def test_header_and_parts_make_the_same_frame_as_one_piece():
    assert frame_header(FrameKind.PAGES, 3) + b"abc" == encode_frame(FrameKind.PAGES, b"abc")
