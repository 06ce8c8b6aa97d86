"""The container's monotonic clock never goes backwards, whatever the network does to the probes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from migrate.clock import Probe, estimate_offset

TIMES = st.integers(min_value=0, max_value=10**15)
DELAYS = st.integers(min_value=0, max_value=10**9)


@st.composite
def host_probes(draw, offset_ns):
    """Probes of a host whose clock is ours + offset; each half of a round trip takes any time."""
    probes, now = [], draw(TIMES)
    for _ in range(draw(st.integers(min_value=1, max_value=5))):
        there, back = draw(DELAYS), draw(DELAYS)
        probes.append(
            Probe(
                sent_ns=now, received_ns=now + there + back, monotonic_ns=now + there + offset_ns, wall_ns=now + there
            )
        )
        now += there + back + draw(DELAYS)
    return probes


OFFSETS = st.integers(min_value=-(10**15), max_value=10**15)


@given(data=st.data(), source=OFFSETS, target=OFFSETS)
def test_the_true_offset_is_within_the_error(data, source, target):
    offset = estimate_offset(data.draw(host_probes(source)), data.draw(host_probes(target)))
    assert abs(offset.estimate_ns - (source - target)) <= offset.error_ns


@given(data=st.data(), source=OFFSETS, target=OFFSETS)
def test_the_offset_given_to_the_target_never_reads_less_than_the_source(data, source, target):
    offset = estimate_offset(data.draw(host_probes(source)), data.draw(host_probes(target)))
    assert offset.never_backwards_ns >= source - target


@given(data=st.data(), source=OFFSETS, target=OFFSETS)
def test_the_clock_jumps_forwards_by_no_more_than_the_shortest_round_trips(data, source, target):
    one, two = data.draw(host_probes(source)), data.draw(host_probes(target))
    offset = estimate_offset(one, two)
    allowed = min(probe.round_trip_ns for probe in one) + min(probe.round_trip_ns for probe in two) + 4
    assert offset.never_backwards_ns - (source - target) <= allowed


def test_wall_clocks_are_compared_too():
    same = [Probe(sent_ns=0, received_ns=10, monotonic_ns=5, wall_ns=1005)]
    later = [Probe(sent_ns=100, received_ns=110, monotonic_ns=105, wall_ns=605)]
    assert estimate_offset(same, later).wall_difference_ns == 500
