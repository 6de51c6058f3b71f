"""Where a machine stands: what is a good location, and which areas it lies in."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry import Location
from engine_registry.errors import InvalidField

NAMES = st.one_of(st.just(""), st.text(string.ascii_letters + string.digits, max_size=5))
LOCATIONS = st.builds(Location, NAMES, NAMES, NAMES)


@given(LOCATIONS)
def test_what_is_written_is_read_again(location: Location) -> None:
    assert Location.parse(str(location)) == location
    assert bool(location) == bool(str(location))


@given(LOCATIONS, LOCATIONS)
def test_two_machines_share_the_areas_whose_names_they_share(
    one: Location, other: Location
) -> None:
    shared = set(one.areas) & set(other.areas)
    assert (one.zone in shared) == bool(one.zone and one.zone == other.zone)
    if one.zone != other.zone:
        assert not shared
    in_rack = bool(one.rack) and one.rack == other.rack and one.zone == other.zone
    on_node = bool(one.node) and one.node == other.node and one.zone == other.zone
    assert len(shared) == sum([bool(one.zone and one.zone == other.zone), in_rack, on_node])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Location()),
        ("//", Location()),
        ("eu-1a", Location("eu-1a")),
        ("eu-1a/r17/node-5.local", Location("eu-1a", "r17", "node-5.local")),
        ("eu-1a//node-5", Location("eu-1a", "", "node-5")),
        ("//node-5", Location("", "", "node-5")),
    ],
)
def test_names_that_are_not_known_may_be_empty(text: str, expected: Location) -> None:
    assert Location.parse(text) == expected


@pytest.mark.parametrize("text", ["a/b/c/d", "eu 1a", "a/:", "-a", "a" * 254, "a/b/\n", None, 7])
def test_what_is_no_location_is_refused_with_the_rule(text: str) -> None:
    with pytest.raises(InvalidField) as caught:
        Location.parse(text)
    assert caught.value.details["field"] == "location"
    assert caught.value.remedy
