"""Whom a rank reads from where others load at the same time: the costs, and the chains and trees
that come of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.sources.chain import costs
from engine_registry import Pull, RankRecord, RankState
from engine_registry.schema.pull_ticket import Reader
from tests.support.builders import a_pull, a_record


def ready(name: str) -> RankRecord:
    return a_record(instance=name, incarnation=name, create_revision=1)


def loading(name: str, order: int) -> RankRecord:
    return a_record(instance=name, incarnation=name, create_revision=order, state=RankState.LOADING)


def pull(source: RankRecord, reader: RankRecord | None = None) -> Pull:
    return a_pull(
        instance=source.instance,
        incarnation=source.incarnation,
        reader=Reader.of(reader) if reader is not None else None,
    )


def cheapest(
    records: Sequence[RankRecord], pulls: Sequence[Pull] = (), hop: float = 0.01, me: str = ""
) -> str:
    cost = costs(records, pulls, {record.incarnation for record in records} | {me}, hop, me)
    return min(cost, key=lambda one: (cost[one], one))


ROOT, A, B, C = ready("root"), loading("a", 2), loading("b", 3), loading("c", 4)


def test_the_first_reads_from_the_complete_one_and_each_that_follows_from_the_one_before_it() -> (
    None
):
    assert cheapest([ROOT]) == "root"
    assert cheapest([ROOT, A]) == "a"
    assert cheapest([ROOT, A, B]) == "b"
    assert cheapest([ROOT, A, B], [pull(ROOT, A)]) == "b"
    assert cheapest([ROOT, A, B], [pull(ROOT, A), pull(A, B)]) == "b"


def test_what_a_ticket_says_counts_for_more_than_what_was_to_be_expected() -> None:
    assert cheapest([ROOT, A, B], [pull(ROOT, A), pull(ROOT, B)]) == "a"
    assert costs([ROOT, A, B], [pull(ROOT, A), pull(ROOT, B)], {"root", "a", "b"}, 0.01) == {
        "root": 3,
        "a": 1.01,
        "b": 1.01,
    }


def test_a_complete_one_without_readers_is_better_than_the_end_of_a_chain() -> None:
    other = ready("other")
    assert cheapest([ROOT, other, A], [pull(ROOT, A)]) == "other"
    # for `a` will read from `other`, which is the first by name
    assert cheapest([ROOT, other, A]) == "root"


def test_where_a_chain_is_so_long_that_its_hops_cost_more_than_to_share_a_source_it_branches() -> (
    None
):
    some = [loading(f"{number:02}", number + 2) for number in range(12)]
    assert [cheapest([ROOT, *some[:count]], hop=0.3) for count in range(8)] == [
        "root",
        "00",
        "01",
        "02",
        "root",
        "04",
        "05",
        "06",
    ]


def test_readers_that_are_not_registered_count_and_those_that_are_not_any_more_do_not() -> None:
    assert costs([ROOT], [pull(ROOT)] * 3, {"root"}, 0.1) == {"root": 4}
    assert costs([ROOT], [pull(ROOT, A)], {"root"}, 0.1) == {"root": 1}
    assert costs([ROOT], [pull(ROOT, A)], {"root", "a"}, 0.1) == {"root": 2}
    assert costs([ROOT], [pull(ROOT, A)], {"root", "a"}, 0.1, me="a") == {"root": 1}
    assert costs([ROOT], [pull(ready("before"))], {"root"}, 0.1) == {"root": 1}


def test_a_reader_of_mine_directly_or_not_is_never_read_from() -> None:
    pulls = [pull(A, B), pull(B, C)]
    assert costs([ROOT, B, C], pulls, {"root", "a", "b", "c"}, 0.1, me="a").keys() == {"root"}
    assert costs([ROOT, A, C], pulls, {"root", "a", "b", "c"}, 0.1, me="b").keys() == {"root", "a"}


@pytest.mark.parametrize("seen", [0, 3])
def test_many_that_join_at_once_and_see_no_tickets_end_up_in_one_chain(seen: int) -> None:
    """Each sees those before it, and of the first few of them also whom they read from."""
    joining: list[RankRecord] = []
    parents: dict[str, str] = {}
    for number in range(30):
        one = loading(f"{number:03}", number + 2)
        pulls = [
            pull(ready(parents[name]), a_record(incarnation=name)) for name in list(parents)[:seen]
        ]
        parents[one.incarnation] = cheapest([ROOT, *joining], pulls, hop=0.001, me=one.incarnation)
        joining.append(one)
    assert Counter(Counter(parents.values()).values()) == {1: 30}
    assert parents["000"] == "root"


names = st.sampled_from(["root", "a", "b", "c", "d", "elsewhere", ""])


@given(st.lists(st.tuples(names, names), max_size=12), st.sampled_from(["", "a", "b", "c"]))
def test_whatever_tickets_say_there_is_an_answer_and_never_one_that_reads_from_me(
    tickets: list[tuple[str, str]], me: str
) -> None:
    pulls = [
        a_pull(incarnation=source, reader=Reader("x", 0, reader) if reader != "elsewhere" else None)
        for source, reader in tickets
    ]
    cost = costs([ROOT, A, B, C], pulls, {"root", "a", "b", "c", "d"}, 0.1, me)
    assert all(value >= 1 for value in cost.values())
    children: dict[str, set[str]] = {}
    for source, reader in tickets:
        if reader in {"a", "b", "c", "d", "root"} - {me}:
            children.setdefault(source, set()).add(reader)
    behind, ahead = set[str](), [me]
    while ahead:
        one = ahead.pop()
        ahead += children.get(one, set()) - behind
        behind |= children.get(one, set())
    assert not (behind & cost.keys()) or me == ""
