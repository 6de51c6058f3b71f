"""The picture of who reads from whom, also of tickets that lie."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine_cli.dashboard.picture import picture
from engine_cli.render.flows import Flows
from engine_registry import Pull, RankRecord, RankState
from engine_registry.schema.pull_ticket import Reader
from tests.support.builders import a_pull, a_record


def rank(name: str, loading: bool = True) -> RankRecord:
    return a_record(
        instance=name,
        world_size=1,
        topology={},
        incarnation=name,
        state=RankState.LOADING if loading else RankState.READY,
    )


def pull(source: str, reader: str) -> Pull:
    return a_pull(
        instance=source,
        incarnation=source,
        load_id=f"{source}-{reader}",
        reader=Reader(reader, 0, reader),
        nbytes=1,
        total_nbytes=4,
    )


def drawn(records: list[RankRecord], pulls: list[Pull], **options: Any) -> dict[str, Any]:
    return picture(Flows(records, pulls), lambda reader: 7.0, **options)


def places(shown: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {node["name"]: (node["column"], node["row"]) for node in shown["nodes"]}


def test_nothing_that_reads_is_an_empty_picture() -> None:
    shown = drawn([rank("a", loading=False)], [])
    assert (shown["nodes"], shown["edges"], shown["loads"]) == ([], [], 0)


def test_a_chain_is_a_line() -> None:
    shown = drawn([rank("a", False), rank("b"), rank("c")], [pull("a", "b"), pull("b", "c")])
    assert places(shown) == {"a/0": (0, 0), "b/0": (1, 0), "c/0": (2, 0)}
    assert shown["edges"] == [[0, 1], [1, 2]]
    assert [node["fraction"] for node in shown["nodes"]] == [None, 0.25, 0.25]


def test_readers_of_one_source_stand_below_each_other() -> None:
    shown = drawn([rank("a", False), rank("b"), rank("c")], [pull("a", "b"), pull("a", "c")])
    assert places(shown) == {"a/0": (0, 0), "b/0": (1, 0), "c/0": (1, 1)}


def test_a_reader_of_two_sources_is_one_node() -> None:
    shown = drawn([rank("a", False), rank("b", False), rank("c")], [pull("a", "c"), pull("b", "c")])
    assert sorted(places(shown)) == ["a/0", "b/0", "c/0"]
    assert len(shown["edges"]) == 2


def test_a_process_that_is_no_rank_has_a_node_without_details() -> None:
    shown = drawn([rank("a", False)], [a_pull(instance="a", incarnation="a")])
    assert [node["instance"] for node in shown["nodes"]] == ["a", None]
    assert shown["nodes"][1]["speed"] == 7


def test_what_does_not_fit_is_counted() -> None:
    pulls = [pull("a", f"r{number}") for number in range(9)]
    shown = drawn([rank("a", False)], pulls, max_nodes=4)
    assert (len(shown["nodes"]), shown["more"]) == (4, 6)
    assert all(end < 4 for edge in shown["edges"] for end in edge)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5))))
def test_any_tickets_make_a_picture_that_ends_and_whose_flows_have_two_nodes(
    pairs: list[tuple[int, int]],
) -> None:
    pulls = [pull(f"n{source}", f"n{reader}") for source, reader in pairs]
    shown = drawn([rank("n0"), rank("n1", False)], pulls)
    names = [node["name"] for node in shown["nodes"]]
    assert set(names) == {f"n{each}/0" for pair in pairs for each in pair}
    assert len(names) == len(set(names))
    assert {(names[one], names[other]) for one, other in shown["edges"]} == {
        (f"n{source}/0", f"n{reader}/0") for source, reader in pairs if source != reader
    }
