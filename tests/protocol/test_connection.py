from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocol import codec, messages
from protocol.connection import (
    IDLE_S,
    MAX_CONTROL_BYTES,
    MAX_PENDING_REQUESTS,
    MAX_QUEUED_PONGS,
    NEED_DATA,
    Connection,
    ConnectionClosed,
    Role,
)
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.framing import FrameKind, encode_frame
from tests.protocol.strategies import REQUEST_BODIES, records

HELLO = messages.Hello(versions=[1, 2], software="test")
WELCOME = messages.Welcome(version=1, host="hostA", software="test")
OTHER_BODIES = [body for body in REQUEST_BODIES if body is not messages.Hello]


def request(number, body=None):
    return messages.Request(number=number, body=body or messages.ReadClock())


def reply(number, body=None):
    clock = messages.ClockReply(reading=messages.ClockReading(monotonic_ns=1, boottime_ns=2, wall_ns=3))
    return messages.Reply(number=number, body=body or clock)


def notice():
    return messages.Notice(body=messages.Progress(migration="abcd", phase="precopy"))


def frame_of(message):
    return encode_frame(FrameKind.CONTROL, codec.encode(message))


def all_events(connection):
    events = []
    while (event := connection.next_event()) is not NEED_DATA:
        events.append(event)
        if isinstance(event, ConnectionClosed):
            break
    return events


def deadline_of(connection, now: float) -> float:
    deadline = connection.next_deadline(now)
    assert deadline is not None
    return float(deadline)


class Pair:
    """Two connections and the wire between them; what one end sends, the other must give as an event."""

    def __init__(self):
        self.ends = {role: Connection(role) for role in Role}
        self.wire = dict.fromkeys(Role, b"")  # bytes on their way to that end
        self.expected: dict[Role, list[Any]] = {role: [] for role in Role}

    def other(self, role):
        return Role.AGENT if role is Role.COORDINATOR else Role.COORDINATOR

    def send(self, role, message):
        self.wire[self.other(role)] += self.ends[role].send(message)
        self.expected[self.other(role)].append(message)

    def deliver(self, role, count=None):
        """The next `count` bytes to that end; every event is compared with what was sent."""
        data = self.wire[role][:count]
        self.wire[role] = self.wire[role][len(data) :]
        if data:
            self.ends[role].receive_data(data)
        self.wire[self.other(role)] += self.ends[role].data_to_send()
        for event in all_events(self.ends[role]):
            assert event == self.expected[role].pop(0)

    def settle(self):
        while any(self.wire.values()):
            for role in Role:
                self.deliver(role)
        assert not any(self.expected.values())


@pytest.fixture
def pair():
    """After Hello and Welcome."""
    pair = Pair()
    pair.send(Role.COORDINATOR, request(0, HELLO))
    pair.settle()
    pair.send(Role.AGENT, reply(0, WELCOME))
    pair.settle()
    return pair


class Conversation(RuleBasedStateMachine):
    """Any legal conversation, cut anywhere: both ends see the same messages and the same pending requests."""

    def __init__(self):
        super().__init__()
        self.pair = Pair()
        self.coordinator = self.pair.ends[Role.COORDINATOR]
        self.agent = self.pair.ends[Role.AGENT]
        self.now = 1000.0

    @precondition(lambda self: self.coordinator.next_number == 0)
    @rule()
    def greet(self):
        self.pair.send(Role.COORDINATOR, request(0, HELLO))

    @precondition(lambda self: self.coordinator.version is not None)
    @rule(body=st.sampled_from(OTHER_BODIES).flatmap(records), gap=st.integers(0, 3))
    def ask(self, body, gap):
        self.pair.send(Role.COORDINATOR, request(self.coordinator.next_number + gap, body))

    @precondition(lambda self: self.agent.pending_replies)
    @rule(data=st.data(), fails=st.booleans())
    def answer(self, data, fails):
        number = data.draw(st.sampled_from(sorted(self.agent.pending_replies)))
        asked = self.agent.pending_replies[number]
        if asked is messages.Hello:
            body = WELCOME
        else:
            body = data.draw(records(messages.Failure if fails else messages.ANSWERS[asked]))
        self.pair.send(Role.AGENT, reply(number, body))

    @precondition(lambda self: self.agent.version is not None)
    @rule(body=records(messages.Progress))
    def tell(self, body):
        self.pair.send(Role.AGENT, messages.Notice(body=body))

    @rule(role=st.sampled_from(Role), count=st.integers(1, 200))
    def deliver_some(self, role, count):
        self.pair.deliver(role, count)

    @rule()
    def deliver_all(self):
        self.pair.settle()
        assert dict(self.agent.pending_replies) == dict(self.coordinator.pending_replies)
        assert self.agent.version == self.coordinator.version

    @rule(role=st.sampled_from(Role))
    def be_quiet_for_a_while(self, role):
        end = self.pair.ends[role]
        self.now = deadline_of(end, self.now)
        self.pair.wire[self.pair.other(role)] += end.handle_timeout(self.now)
        self.pair.settle()
        assert end.next_deadline(self.now) == self.now + IDLE_S

    @invariant()
    def every_open_request_of_the_agent_is_one_of_the_coordinator(self):
        sent = set(self.coordinator.pending_replies)
        replies_under_way = {m.number for m in self.pair.expected[Role.COORDINATOR] if isinstance(m, messages.Reply)}
        assert set(self.agent.pending_replies) | replies_under_way <= sent
        assert all(end.usable for end in self.pair.ends.values())


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def agent_that_greeted():
    agent = Connection(Role.AGENT)
    agent.receive_data(frame_of(request(0, HELLO)))
    all_events(agent)
    agent.send(reply(0, WELCOME))
    return agent


def coordinator_that_greeted(*asked):
    coordinator = Connection(Role.COORDINATOR)
    coordinator.send(request(0, HELLO))
    coordinator.receive_data(frame_of(reply(0, WELCOME)))
    all_events(coordinator)
    for number, body in asked:
        coordinator.send(request(number, body))
    return coordinator


BAD_FOR_AGENT = {
    "reply-from-coordinator": [reply(0)],
    "notice-from-coordinator": [notice()],
    "number-again": [request(3), request(3)],
    "number-back": [request(3), request(2)],
    "hello-again": [request(1, HELLO)],
    "too-many": [request(number) for number in range(1, MAX_PENDING_REQUESTS + 2)],
}
BAD_FOR_COORDINATOR = {
    "request-from-agent": [request(5)],
    "nobody-asked": [reply(9)],
    "answered-twice": [reply(1), reply(1)],
    "wrong-type": [reply(1, messages.Done())],
    "welcome-again": [reply(1, WELCOME)],
}


@pytest.mark.parametrize("bad", BAD_FOR_AGENT.values(), ids=BAD_FOR_AGENT)
def test_what_a_coordinator_may_not_send_is_refused_by_both_ends(bad):
    agent, coordinator = agent_that_greeted(), coordinator_that_greeted()
    *good, last = bad
    for message in good:
        agent.receive_data(coordinator.send(message))
    all_events(agent)
    with pytest.raises(LocalProtocolError):
        coordinator.send(last)
    agent.receive_data(frame_of(last))
    with pytest.raises(RemoteProtocolError):
        agent.next_event()
    assert not agent.usable
    assert not coordinator.usable


@pytest.mark.parametrize("bad", BAD_FOR_COORDINATOR.values(), ids=BAD_FOR_COORDINATOR)
def test_what_an_agent_may_not_send_is_refused_by_both_ends(bad):
    agent, coordinator = agent_that_greeted(), coordinator_that_greeted((1, None))
    agent.receive_data(frame_of(request(1)))
    all_events(agent)
    *good, last = bad
    for message in good:
        coordinator.receive_data(agent.send(message))
    all_events(coordinator)
    with pytest.raises(LocalProtocolError):
        agent.send(last)
    coordinator.receive_data(frame_of(last))
    with pytest.raises(RemoteProtocolError):
        coordinator.next_event()
    assert not agent.usable
    assert not coordinator.usable


def test_the_first_request_is_hello():
    with pytest.raises(LocalProtocolError, match="Hello"):
        Connection(Role.COORDINATOR).send(request(0))
    agent = Connection(Role.AGENT)
    agent.receive_data(frame_of(request(0)))
    with pytest.raises(RemoteProtocolError, match="Hello"):
        agent.next_event()


def test_nothing_is_asked_or_told_before_welcome():
    coordinator = Connection(Role.COORDINATOR)
    coordinator.send(request(0, HELLO))
    with pytest.raises(LocalProtocolError, match="before Hello was answered"):
        coordinator.send(request(1))
    with pytest.raises(LocalProtocolError, match="before Welcome"):
        Connection(Role.AGENT).send(notice())


def test_a_version_that_was_not_offered_is_refused_by_both_ends():
    strange = reply(0, messages.Welcome(version=7, host="", software=""))
    agent, coordinator = Connection(Role.AGENT), Connection(Role.COORDINATOR)
    agent.receive_data(coordinator.send(request(0, HELLO)))
    all_events(agent)
    with pytest.raises(LocalProtocolError, match="version 7"):
        agent.send(strange)
    coordinator.receive_data(frame_of(strange))
    with pytest.raises(RemoteProtocolError, match="version 7"):
        coordinator.next_event()


def test_a_failure_answers_anything():
    failure = messages.Failure(family="version", code="version", message="no version in common")
    agent, coordinator = Connection(Role.AGENT), Connection(Role.COORDINATOR)
    agent.receive_data(coordinator.send(request(0, HELLO)))
    all_events(agent)
    coordinator.receive_data(agent.send(reply(0, failure)))
    assert all_events(coordinator) == [reply(0, failure)]
    assert coordinator.version is None
    assert not coordinator.pending_replies


@pytest.mark.parametrize("kind", [kind for kind in FrameKind if kind not in {1, 9, 10}])
@pytest.mark.parametrize("role", Role)
def test_frames_of_other_links_have_no_place_here(role, kind):
    connection = Connection(role)
    connection.receive_data(encode_frame(kind, b""))
    with pytest.raises(RemoteProtocolError, match=kind.name):
        connection.next_event()


def test_messages_before_a_broken_one_are_given_and_the_error_stays():
    agent = agent_that_greeted()
    agent.receive_data(frame_of(request(1)) + frame_of(request(2)) + b"\xff" * 5)
    assert [agent.next_event(), agent.next_event()] == [request(1), request(2)]
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="frame kind"):
            agent.next_event()
    with pytest.raises(LocalProtocolError, match="of no use"):
        agent.send(reply(1))
    assert agent.next_deadline(0.0) is None
    agent.receive_data(b"more of it is not looked at")


@given(data=st.data())
def test_a_changed_byte_anywhere_gives_events_or_a_remote_error(data):
    stream = bytearray(frame_of(request(1, data.draw(st.sampled_from(OTHER_BODIES).flatmap(records)))) * 2)
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    agent = agent_that_greeted()
    agent.receive_data(stream)
    agent.receive_data(b"")
    try:
        assert all_events(agent)[-1] == ConnectionClosed(unanswered=tuple(agent.pending_replies))
    except RemoteProtocolError:
        assert not agent.usable


def test_the_end_between_frames_is_an_event_that_names_what_was_not_answered():
    coordinator = coordinator_that_greeted((1, None), (4, None))
    coordinator.receive_data(frame_of(reply(1)))
    coordinator.receive_data(b"")
    assert all_events(coordinator) == [reply(1), ConnectionClosed(unanswered=(4,))]
    assert coordinator.next_event() == ConnectionClosed(unanswered=(4,))
    assert not coordinator.usable
    with pytest.raises(LocalProtocolError, match="closed"):
        coordinator.send(request(5))
    with pytest.raises(LocalProtocolError, match="after the end"):
        coordinator.receive_data(b"x")


@pytest.mark.parametrize("cut", [1, 4, 5, 6, -1])
def test_the_end_inside_a_frame_is_an_error(cut):
    agent = agent_that_greeted()
    agent.receive_data(frame_of(request(1))[:cut])
    agent.receive_data(b"")
    with pytest.raises(RemoteProtocolError, match="cut inside a frame"):
        agent.next_event()


def test_a_message_that_does_not_fit_its_schema_is_not_sent_and_breaks_nothing():
    coordinator = coordinator_that_greeted()
    for body in (
        messages.InspectContainer(container="../etc"),
        messages.GetStatus(migration="\udc80"),
        messages.GetStatus(migration="x" * (MAX_CONTROL_BYTES + 1)),
    ):
        with pytest.raises(LocalProtocolError):
            coordinator.send(request(1, body))
    assert not coordinator.pending_replies
    assert coordinator.send(request(1))


def test_a_control_frame_over_the_limit_is_refused_by_its_header():
    agent = agent_that_greeted()
    agent.receive_data(encode_frame(FrameKind.CONTROL, bytes(MAX_CONTROL_BYTES + 1))[:5])
    with pytest.raises(RemoteProtocolError, match="over"):
        agent.next_event()


def test_a_ping_is_answered_without_an_event(pair):
    pinging, answering = pair.ends[Role.COORDINATOR], pair.ends[Role.AGENT]
    start = 50.0
    assert pinging.next_deadline(start) == start + IDLE_S
    assert pinging.handle_timeout(start + IDLE_S - 0.1) == b""
    answering.receive_data(pinging.handle_timeout(start + IDLE_S))
    assert answering.next_event() is NEED_DATA
    pong = answering.data_to_send()
    assert answering.data_to_send() == b""
    pinging.receive_data(pong)
    assert pinging.next_event() is NEED_DATA
    assert pinging.next_deadline(start + 11) == start + 11 + IDLE_S


@pytest.mark.parametrize("role", Role)
def test_three_unanswered_pings_lose_the_link(role):
    connection = Connection(role)
    now = deadline_of(connection, 0.0)
    for _ in range(3):
        assert connection.handle_timeout(now) != b""
        assert connection.handle_timeout(now) == b"", "one ping an interval"
        now = deadline_of(connection, now)
    with pytest.raises(RemoteProtocolError, match="link lost"):
        connection.handle_timeout(now)
    assert not connection.usable
    with pytest.raises(RemoteProtocolError, match="link lost"):
        connection.next_event()


def test_anything_heard_is_a_sign_of_life(pair):
    agent = pair.ends[Role.AGENT]
    now = 0.0
    for number in range(1, 8):
        agent.next_deadline(now)
        now += IDLE_S
        assert agent.handle_timeout(now)
        agent.receive_data(frame_of(request(number)))
        all_events(agent)


def test_an_own_pause_of_minutes_does_not_lose_the_link(pair):
    agent = pair.ends[Role.AGENT]
    agent.next_deadline(0.0)
    assert agent.handle_timeout(600.0), "asks first"
    assert agent.next_deadline(600.0) == 600.0 + IDLE_S


def test_a_pong_that_answers_no_ping_is_refused(pair):
    agent = pair.ends[Role.AGENT]
    agent.receive_data(encode_frame(FrameKind.PONG, (1).to_bytes(8, "big")))
    with pytest.raises(RemoteProtocolError, match="answers no PING"):
        agent.next_event()


def test_a_ping_of_another_size_is_refused(pair):
    agent = pair.ends[Role.AGENT]
    agent.receive_data(encode_frame(FrameKind.PING, b""))
    with pytest.raises(RemoteProtocolError, match="8 bytes"):
        agent.next_event()


def test_a_flood_of_pings_does_not_fill_memory(pair):
    agent = pair.ends[Role.AGENT]
    agent.receive_data(encode_frame(FrameKind.PING, bytes(8)) * (MAX_QUEUED_PONGS + 1))
    with pytest.raises(RemoteProtocolError, match="PING frames"):
        agent.next_event()
    assert agent.data_to_send() == b""
