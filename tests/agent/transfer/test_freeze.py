"""What is different in a stream while its container is frozen."""

from __future__ import annotations

import os

import pytest

from agent.engine import base
from tests.agent.transfer.test_packets import nothing_more, number_of, numbered, pair, receive, wires  # noqa: F401

pytestmark = [pytest.mark.root, pytest.mark.kernel]


def is_urgent(stream) -> bool:
    return os.sched_getscheduler(stream.process.pid) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO


def may_be_urgent() -> bool:
    """Whether this control group has a share of real time at all."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return False
    os.sched_setscheduler(0, *before)
    return True


def test_packets_wait_for_the_last_section_and_stay_in_order(pair, wires):  # noqa: F811
    outside, inside = wires
    with outside.catcher() as catcher, outside.sender() as client, inside.sender() as inject, inside.catcher() as seen:
        pair.target.service.send(base.StreamInject(), [inject.fileno()])
        pair.target.engine.send(base.ReleasePackets(receive_next={}))
        pair.source.engine.send(base.CapturePackets(), [catcher.fileno()])
        pair.source.engine.send(base.Urgent(on=True))
        pair.source.ask(base.StreamGetCounters())
        for number in range(50):
            client.send(numbered(number))
        assert pair.source.ask(base.StreamGetCounters()).packets == 0
        pair.source.engine.send(base.ForwardPackets())
        assert [number_of(frame) for frame in receive(seen, 50)] == list(range(50))
        client.send(numbered(50))
        assert number_of(receive(seen, 1)[0]) == 50
        assert nothing_more(seen)


def test_packets_are_not_held_for_longer_than_a_short_freeze(pair, wires):  # noqa: F811
    outside, inside = wires
    with outside.catcher() as catcher, outside.sender() as client, inside.sender() as inject, inside.catcher() as seen:
        pair.target.service.send(base.StreamInject(), [inject.fileno()])
        pair.target.engine.send(base.ReleasePackets(receive_next={}))
        pair.source.engine.send(base.CapturePackets(), [catcher.fileno()])
        pair.source.engine.send(base.Urgent(on=True))
        client.send(numbered(1))
        assert number_of(receive(seen, 1)[0]) == 1


def test_held_packets_are_put_back_in_order_on_a_roll_back(pair, wires):  # noqa: F811
    outside, inside = wires
    with outside.catcher() as catcher, outside.sender() as client, inside.sender() as inject, inside.catcher() as seen:
        pair.source.engine.send(base.CapturePackets(), [catcher.fileno()])
        pair.source.engine.send(base.Urgent(on=True))
        for number in range(20):
            client.send(numbered(number))
        assert pair.source.ask(base.StreamReplay(), [inject.fileno()]).packets == 20
        client.send(numbered(20))
        assert [number_of(frame) for frame in receive(seen, 21)] == list(range(21))


def test_both_streams_go_before_others_until_it_is_over(pair):  # noqa: F811
    for side in (pair.source, pair.target):
        side.engine.send(base.Urgent(on=True))
        side.ask(base.StreamGetCounters())
    assert is_urgent(pair.source) is is_urgent(pair.target) is may_be_urgent()
    for side in (pair.source, pair.target):
        side.engine.send(base.Urgent(on=False))
        side.ask(base.StreamGetCounters())
        assert not is_urgent(side)
