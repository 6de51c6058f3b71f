"""The order of sources: whatever there is, our zone comes first, and nothing is read beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from engine_loader import InProcessEngine
from engine_loader.engines.nearness import distance
from engine_loader.sources.groups import Group
from engine_loader.sources.ordering import Ordering
from engine_registry import Location, RankRecord, RankState, Registry
from engine_registry.holders.query import Holders
from tests.support.builders import a_record

NOBODY = cast(Registry, None)  # readers have been counted
NAMES = st.sampled_from(["", "x", "y"])
LOCATIONS = st.builds(Location, NAMES, NAMES, NAMES)
RANKS = st.lists(
    st.tuples(LOCATIONS, st.sampled_from([RankState.READY, RankState.LOADING]), st.integers(0, 3)),
    min_size=1,
    max_size=12,
)
HOPS = st.sampled_from([0.0, 0.03, 0.5])


def made(
    ranks: list[tuple[Location, RankState, int]],
) -> tuple[list[RankRecord], dict[str, int]]:
    """Ranks of one content, and how many read from each."""
    records = [
        a_record(instance=f"i{number}", incarnation=f"{number:032x}", location=where, state=state)
        for number, (where, state, _) in enumerate(ranks)
    ]
    return records, {
        record.incarnation: readers for record, (_, _, readers) in zip(records, ranks, strict=True)
    }


def check(group: Group, records: list[RankRecord], engine: InProcessEngine) -> None:
    """All are there, those of our zone first; of two zones only one is read at once."""
    order = [record for (record,) in group.teams]
    assert sorted(record.incarnation for record in order) == sorted(
        record.incarnation for record in records
    )
    leaves = [distance(record, engine)[0] for record in order]
    assert leaves == sorted(leaves)
    assert 1 <= group.at_once <= min(len(order), 4)
    assert len(set(leaves[: group.at_once])) == 1


@given(RANKS, LOCATIONS)
def test_of_complete_ranks_those_of_our_zone_come_first_then_the_least_busy_then_the_nearest(
    ranks: list[tuple[Location, RankState, int]], here: Location
) -> None:
    engine = InProcessEngine(location=str(here))
    records, readers = made([(where, RankState.READY, count) for where, _, count in ranks])
    (group,) = Ordering(NOBODY, engine, 4).of_ranks(records, readers)
    check(group, records, engine)
    prices = [price(record, readers, engine) for (record,) in group.teams]
    assert prices == sorted(prices)


def price(
    record: RankRecord, readers: Mapping[str, int], engine: InProcessEngine
) -> tuple[bool, int, float]:
    leaves, far = distance(record, engine)
    return leaves, readers[record.incarnation], far


@given(RANKS, LOCATIONS, HOPS)
def test_in_a_chain_too_those_of_our_zone_come_first_and_are_read_alone(
    ranks: list[tuple[Location, RankState, int]], here: Location, hop: float
) -> None:
    engine = InProcessEngine(location=str(here))
    records, readers = made(ranks)
    loading = tuple(record for record in records if record.state is RankState.LOADING)
    holders = Holders(loading=loading, ahead=len(loading), readers=readers, revision=7)
    (group,) = Ordering(NOBODY, engine, 4).of_a_chain(records, holders, hop)
    check(group, records, engine)
    assert group.free_since == 7
    if group.at_once > 1:
        together = [record for (record,) in group.teams[: group.at_once]]
        assert all(record.state is RankState.READY for record in together)
        assert not any(readers[record.incarnation] for record in together)
