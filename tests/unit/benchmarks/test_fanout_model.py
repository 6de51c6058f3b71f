"""The times of fan-out on paper, and the rule by which receivers choose, beside the one that loads
follow.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fanout.model import (
    Fabric,
    all_from_one,
    complete_then_chain,
    crossings,
    depths_of,
    in_zones,
    joined,
    joined_at_once,
    pipelined,
    pipelined_chain,
    pipelined_chains,
    pipelined_tree,
)
from benchmarks.fanout.plot import svg

# a hop of half a second
FABRIC = Fabric(nbytes_per_s=100, start_s=1, notice_s=0.3, in_flight_nbytes=10)
NBYTES = 1000  # ten seconds of a link


@pytest.mark.parametrize(("receivers", "wanted"), [(1, 11), (2, 21), (8, 81)])
def test_the_seed_sends_all_to_each(receivers: int, wanted: float) -> None:
    assert all_from_one(FABRIC, NBYTES, receivers) == wanted


@pytest.mark.parametrize(("receivers", "rounds"), [(1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4)])
def test_complete_sources_double_with_each_round(receivers: int, rounds: int) -> None:
    assert complete_then_chain(FABRIC, NBYTES, receivers) == rounds * 11


@pytest.mark.parametrize(("receivers", "wanted"), [(1, 11), (2, 11.5), (8, 14.5)])
def test_in_a_chain_each_receiver_adds_a_hop(receivers: int, wanted: float) -> None:
    assert pipelined_chain(FABRIC, NBYTES, receivers) == wanted


def test_two_chains_share_the_seeds_link() -> None:
    assert pipelined_chains(FABRIC, NBYTES, 8, 2) == 1 + 20 + 3 * 0.5


@pytest.mark.parametrize(
    ("receivers", "depth"), [(1, 1), (2, 1), (3, 2), (6, 2), (7, 3), (14, 3), (15, 4)]
)
def test_a_tree_is_as_deep_as_its_width_needs(receivers: int, depth: int) -> None:
    assert pipelined_tree(FABRIC, NBYTES, receivers, 2) == 1 + 20 + (depth - 1) * 0.5


@given(st.integers(1, 40), st.integers(1, 4))
def test_the_formulas_are_those_trees(receivers: int, degree: int) -> None:
    heap: list[int | None] = [
        None if number < degree else number // degree - 1 for number in range(receivers)
    ]
    if receivers >= degree:  # else nobody has all the readers that the formula counts
        assert pipelined(FABRIC, NBYTES, heap) == pytest.approx(
            pipelined_tree(FABRIC, NBYTES, receivers, degree)
        )
    chains: list[int | None] = [
        None if number < degree else number - degree for number in range(receivers)
    ]
    if receivers >= degree:
        assert pipelined(FABRIC, NBYTES, chains) == pytest.approx(
            pipelined_chains(FABRIC, NBYTES, receivers, degree)
        )


def test_hops_that_cost_nothing_make_one_chain_and_dear_ones_a_star() -> None:
    assert joined(6, 0.0) == [None, 0, 1, 2, 3, 4]
    assert joined(6, 100.0) == [None] * 6
    assert depths_of(joined(6, 0.0)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("hop", [0.02, 0.03, 0.1, 0.2])
@pytest.mark.parametrize("receivers", [30, 300, 3000])
def test_however_many_join_nobody_has_more_than_two_readers_and_no_way_is_long(
    receivers: int, hop: float
) -> None:
    """Though each sees eight of those before it."""
    for seed in range(3):
        parents = joined(receivers, hop, seed=seed)
        assert max(Counter(parents).values()) <= 2
        assert max(depths_of(parents)) < 1 / hop + 60


@pytest.mark.parametrize("at_once", [8, 64, 1000])
def test_however_many_look_at_once_a_few_are_refused_and_nobody_has_many_readers(
    at_once: int,
) -> None:
    for seed in range(3):
        parents, refused = joined_at_once(1000, 0.03, at_once, seed)
        assert all(parent is None or parent < number for number, parent in enumerate(parents))
        assert max(Counter(parents).values()) <= 4
        assert refused < 1.0


@given(st.integers(1, 33))
def test_as_many_as_make_a_chain_become_one(receivers: int) -> None:
    assert joined(receivers, 0.03) == [None, *range(receivers - 1)]


@pytest.mark.parametrize("zones", [2, 4])
@pytest.mark.parametrize("receivers", [30, 1000])
def test_a_zone_without_the_seed_is_entered_once_and_nobody_has_many_readers(
    receivers: int, zones: int
) -> None:
    for seed in range(3):
        where = in_zones(receivers, zones, seed)
        parents = joined(receivers, 0.03, seed, where)
        assert crossings(parents, where) == len(set(where) - {0})
        assert max(Counter(parents).values()) <= 1 + zones
        assert crossings(joined(receivers, 0.03, seed), where) > receivers / 4
        crowded, _ = joined_at_once(receivers, 0.03, receivers, seed, where)
        assert crossings(crowded, where) == len(set(where) - {0})


def test_the_plot_has_a_line_and_points_for_each_strategy() -> None:
    drawn = svg(
        "title", {"one": [(1, 5.0, 4.0), (8, 40.0, 39.0)], "two": [(1, 5.0, 5.0), (8, 6.0, 6.0)]}
    )
    assert drawn.count("<circle") == 4
    assert drawn.count("<polyline") == 4
    assert all(f">{text}</text>" in drawn for text in ("one", "two", "title", "1", "8", "40"))
