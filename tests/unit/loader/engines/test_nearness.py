"""How near a rank is: by what both machines say of themselves, and by the host name."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader import InProcessEngine
from engine_loader.engines.nearness import Nearness, distance
from engine_registry import Location
from tests.support.builders import a_record

NAMES = st.sampled_from(["", "x", "y"])
LOCATIONS = st.builds(Location, NAMES, NAMES, NAMES)
HOSTS = st.sampled_from([socket.gethostname(), "another"])
NEAREST_FIRST = list(Nearness)


def near(here: str, there: str, host: str = "another") -> Nearness:
    record = a_record(host=host, location=Location.parse(there))
    return Nearness.of(record, InProcessEngine(location=here))


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ("b/r/n", "b/r/n", Nearness.NODE),
        ("b//n", "b/r/n", Nearness.NODE),
        ("//n", "//n", Nearness.NODE),
        ("b/r/n", "b/r/m", Nearness.RACK),
        ("b/r", "b/r", Nearness.RACK),
        ("/r", "/r", Nearness.RACK),
        ("b/r", "b/q", Nearness.ZONE),
        ("b", "b/r/n", Nearness.ZONE),
        ("b", "a", Nearness.ELSEWHERE),
        ("b/r/n", "a/r/n", Nearness.ELSEWHERE),
        ("b", "", Nearness.UNKNOWN),
        ("", "b", Nearness.UNKNOWN),
        ("b/r", "/r", Nearness.UNKNOWN),
        ("", "", Nearness.UNKNOWN),
    ],
)
def test_a_rank_is_as_near_as_what_both_have_in_common(
    here: str, there: str, expected: Nearness
) -> None:
    assert near(here, there) is expected


def test_one_host_name_is_one_machine_unless_both_say_that_it_is_not() -> None:
    this = socket.gethostname()
    assert near("", "", this) is Nearness.NODE
    assert near("b/r/n", "b/r", this) is Nearness.NODE
    assert near("b/r/n", "b/r/m", this) is Nearness.RACK
    assert near("b", "a", this) is Nearness.ELSEWHERE


@given(LOCATIONS, LOCATIONS, HOSTS)
def test_the_nearer_costs_no_more_and_only_another_zone_is_left_for(
    here: Location, there: Location, host: str
) -> None:
    engine = InProcessEngine(location=str(here))
    record = a_record(host=host, location=there)
    leaves, far = distance(record, engine)
    assert 0 <= far < 1
    assert leaves == (
        bool(here.zone)
        and here.zone != there.zone
        and Nearness.of(record, engine) is not Nearness.NODE
    )
    for other in (Location(), here, Location(here.zone), Location("other")):
        one = a_record(host=host, location=other)
        nearer, farther = sorted(
            [record, one], key=lambda each: NEAREST_FIRST.index(Nearness.of(each, engine))
        )
        assert distance(nearer, engine) <= distance(farther, engine)
