"""Whom a rank reads from where others load at the same time: the costs, and the chains and trees
that come of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.sources.chain import chain_length, costs


def cost_of(
    ready: Sequence[str],
    loading: Sequence[str] = (),
    readers: Mapping[str, int] | None = None,
    *,
    ahead: int | None = None,
    all_ready: bool = True,
    hop: float = 0.01,
) -> dict[str, float]:
    return costs(
        ready,
        loading,
        readers or {},
        ahead=len(loading) if ahead is None else ahead,
        all_ready=all_ready,
        hop=hop,
    )


def cheapest(
    ready: Sequence[str],
    loading: Sequence[str] = (),
    readers: Mapping[str, int] | None = None,
    **options: Any,
) -> str:
    cost = cost_of(ready, loading, readers, **options)
    return min(cost, key=lambda one: (cost[one], one))


def test_the_first_reads_from_the_complete_one_and_each_that_follows_from_the_one_before_it() -> (
    None
):
    assert cheapest(["root"]) == "root"
    assert cheapest(["root"], ["a"]) == "a"
    assert cheapest(["root"], ["b", "a"]) == "b"
    assert cost_of(["root"], ["b", "a"]) == {"root": 2, "b": 1.02, "a": 2.01}


def test_readers_that_are_known_count_for_more_than_those_that_are_expected() -> None:
    assert cost_of(["root"], ["b", "a"], {"root": 3, "b": 1, "a": 2}) == {
        "root": 4,
        "b": 2.02,
        "a": 3.01,
    }


def test_a_complete_one_without_readers_is_better_than_the_end_of_a_chain() -> None:
    assert cheapest(["other", "root"], ["a"], {"root": 1}) == "other"
    # of more than are seen, nobody knows which ones those ahead will take
    assert cheapest(["other"], ["c", "b", "a"], all_ready=False) == "other"
    assert cheapest(["other"], ["c", "b", "a"], all_ready=True) == "c"


def test_a_chain_grows_until_its_hops_cost_as_much_as_to_share_a_source() -> None:
    assert [chain_length(hop) for hop in (0.01, 0.03, 0.3, 1.0, 7.0)] == [100, 33, 3, 1, 0]
    assert chain_length(0.0) > 10**6
    assert cheapest(["root"], ["c", "b", "a"], hop=0.3) == "c"
    assert cheapest(["root"], ["d", "c", "b", "a"], {"root": 2, "d": 1}, hop=0.3) == "c"
    assert cheapest(["root"], ["c", "b"], {"root": 1, "c": 1, "b": 1}, ahead=3, hop=0.3) == "root"


def test_where_hops_are_dear_a_source_is_shared_at_once() -> None:
    assert cheapest(["root"], ["a"], {"root": 1}, ahead=1, hop=2.0) == "root"


@pytest.mark.parametrize("hop", [0.03, 0.2])
def test_of_those_that_are_spread_over_a_tree_the_one_with_the_fewest_readers_is_best(
    hop: float,
) -> None:
    assert cheapest(["root"], ["x", "y", "z"], {"root": 2, "x": 1, "z": 1}, ahead=400, hop=hop) == (
        "y"
    )


def test_behind_a_chain_its_members_and_its_source_are_expected_to_have_their_readers() -> None:
    seen = [f"{number:03}" for number in range(35, 0, -5)]  # of 36, the last one first
    cost = cost_of(["root"], seen, ahead=36, hop=0.03)
    assert cost["root"] == 3  # the chain, and the first one behind it
    assert [one for one in seen if cost[one] == 1.5] == ["035"]
    assert {cost[one] for one in seen[1:]} == {2.5}
    assert cost_of(["root"], seen, ahead=36, hop=0.03, all_ready=False)["root"] == 1


def test_many_that_begin_at_once_and_see_no_ticket_choose_each_another() -> None:
    order = [f"{number:03}" for number in range(33)]
    chosen = [
        cheapest(["root"], order[:number][::-1][:8], ahead=number, hop=0.03) for number in range(33)
    ]
    assert chosen == ["root", *order[:-1]]
    assert set(Counter(chosen).values()) == {1}


NAMES = [f"{number:02}" for number in range(12)]


@given(
    st.lists(st.sampled_from(NAMES), unique=True, min_size=1),
    st.dictionaries(st.sampled_from(NAMES), st.integers(0, 5)),
    st.integers(0, 50),
    st.booleans(),
    st.floats(0.0, 10.0),
    st.data(),
)
def test_every_rank_has_a_cost_and_one_with_more_readers_costs_more(
    names: list[str],
    readers: dict[str, int],
    more: int,
    all_ready: bool,
    hop: float,
    data: st.DataObject,
) -> None:
    number = data.draw(st.integers(0, len(names)))
    ready, loading = names[:number], names[number:]
    known = {name: readers.get(name, 0) for name in names}
    ahead = len(loading) + more
    cost = cost_of(ready, loading, known, ahead=ahead, all_ready=all_ready, hop=hop)
    assert cost.keys() == set(names)
    assert all(cost[name] >= 1 + known[name] for name in names)
    for name in names:
        busier = {**known, name: known[name] + 3}
        again = cost_of(ready, loading, busier, ahead=ahead, all_ready=all_ready, hop=hop)
        assert again[name] > cost[name]
