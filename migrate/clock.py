"""How far apart the monotonic clocks of two hosts are, from probes of both by a third clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PROBES = 5  # The shortest round trip of five is within tens of microseconds of the link's own.


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One reading of a host's clock, between two of our own. All in ns."""

    sent_ns: int
    received_ns: int
    monotonic_ns: int
    wall_ns: int = 0

    @property
    def round_trip_ns(self) -> int:
        """How long the host may have taken to read its clock, at most."""
        return self.received_ns - self.sent_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Offset:
    """source clock - target clock."""

    estimate_ns: int
    error_ns: int  # the truth is within estimate +- error
    wall_difference_ns: int = 0  # source - target, as rough as the error

    @property
    def never_backwards_ns(self) -> int:
        """An offset to add to the target's clock that never gives less than the source's clock reads."""
        return self.estimate_ns + self.error_ns


def best(probes: Sequence[Probe]) -> Probe:
    """The probe with the shortest round trip."""
    return min(probes, key=lambda probe: probe.round_trip_ns)


def estimate_offset(source: Sequence[Probe], target: Sequence[Probe]) -> Offset:
    """The offset between the two hosts' clocks; each sequence has at least one probe.

    Both hosts are read by the same clock of ours: host - ours is known to half a round trip each.
    """
    one, two = best(source), best(target)
    # Twice each value, so that the middle of a round trip stays a whole number of ns.
    doubled = _doubled_offset(one, one.monotonic_ns) - _doubled_offset(two, two.monotonic_ns)
    error_ns = (one.round_trip_ns + two.round_trip_ns + 1) // 2 + 1
    wall = _doubled_offset(one, one.wall_ns) - _doubled_offset(two, two.wall_ns)
    return Offset(estimate_ns=doubled // 2, error_ns=error_ns, wall_difference_ns=wall // 2)


def _doubled_offset(probe: Probe, reading_ns: int) -> int:
    return 2 * reading_ns - probe.sent_ns - probe.received_ns
