from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import UnsupportedError
from protocol.messages import VERSIONS
from protocol.negotiation import choose_version

version_sets = st.sets(st.integers(1, 8), max_size=5)
our_versions = st.sets(st.integers(1, 8), min_size=1, max_size=5)


@given(offered=version_sets, supported=our_versions)
def test_the_newest_common_version_is_chosen_or_the_refusal_names_both_sides(offered, supported):
    if offered & supported:
        assert choose_version(offered, supported) == max(offered & supported)
        return
    with pytest.raises(UnsupportedError) as caught:
        choose_version(offered, supported)
    assert caught.value.code == "version"
    assert "upgrade the program of" in caught.value.hint


def test_two_programs_of_this_release_understand_each_other():
    assert choose_version(list(VERSIONS)) == max(VERSIONS)


def test_the_older_side_is_the_one_to_upgrade():
    with pytest.raises(UnsupportedError) as old_coordinator:
        choose_version([1, 2], [3, 4], offering="desk", answering="hostB")
    assert str(old_coordinator.value) == (
        "no protocol version in common: desk speaks 1, 2, hostB speaks 3, 4 (upgrade the program of desk)"
    )
    with pytest.raises(UnsupportedError, match="upgrade the program of hostB"):
        choose_version([3, 4], [1, 2], offering="desk", answering="hostB")


def test_no_version_offered_is_refused():
    with pytest.raises(UnsupportedError, match="offers no protocol version"):
        choose_version([])
