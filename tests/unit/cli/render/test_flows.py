"""Who reads from whom: progress, readers and the tree, also of tickets that lie."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_cli.render.documents import loading_json, pull_json
from engine_cli.render.flows import Arrived, Flows, Line, percent
from engine_cli.render.texts import (
    instance_row,
    instance_state,
    rank_state,
    read_by,
    reads_from,
    some_of,
    tree_rows,
)
from engine_registry import ModelIdentity, Pull, RankRecord, RankState
from engine_registry.schema.pull_ticket import Reader
from engine_registry.schema.record import ManifestRef
from tests.support.assessment import assess
from tests.support.builders import a_pull, a_record


def rank(name: str, *, loading: bool = False, **changes: Any) -> RankRecord:
    """The record of `instance/rank`; its incarnation is the name."""
    instance, _, number = name.partition("/")
    state = RankState.LOADING if loading else RankState.READY
    fields: dict[str, Any] = {
        "world_size": 9,
        "topology": {},
        "state": state,
        "incarnation": name,
        **changes,
    }
    return a_record(instance=instance, rank=int(number), **fields)


def pull(
    source: str, reader: str, done: int = 0, of: int = 100, revision: int = 0, **changes: Any
) -> Pull:
    """`reader` is a rank's name, or a host."""
    instance, _, number = source.partition("/")
    name, _, its_rank = reader.partition("/")
    who = {"reader": Reader(name, int(its_rank), reader)} if its_rank else {"host": name, "pid": 7}
    fields = {
        "load_id": f"{reader.replace('/', '.')}-{revision}",
        "nbytes": done,
        "total_nbytes": of,
        "create_revision": revision,
    }
    return a_pull(
        instance=instance, rank=int(number), incarnation=source, **{**who, **fields, **changes}
    )


A, B, C = rank("a/0"), rank("b/0", loading=True), rank("c/0", loading=True)


def drawn(flows: Flows | list[Line]) -> list[str]:
    lines = flows.tree() if isinstance(flows, Flows) else flows
    return [f"{'  ' * depth}{text}" for depth, text in tree_rows(lines)]


# -- progress
# --------------------------------------------------------------------------------------------------


def test_a_rank_is_as_far_as_its_ticket_says() -> None:
    flows = Flows([A, B, C], [pull("a/0", "b/0", 63)])
    assert flows.progress(B) == Arrived(63, 100)
    assert [flows.progress(other) for other in (A, C)] == [None, None]
    assert (
        [each.load_id for each in flows.readers(A)]
        == [each.load_id for each in flows.reads(B)]
        == ["b.0-0"]
    )
    assert (flows.readers(B), flows.reads(A)) == ((), ())


def test_of_several_tickets_the_newest_counts_that_says_anything() -> None:
    """The last try of a load, and not what one before has left."""
    pulls = [
        pull("a/0", "b/0", 90, revision=3),
        pull("c/0", "b/0", 20, revision=5),
        pull("d/0", "b/0", 0, of=0, revision=8),
    ]
    assert Flows([B], pulls).progress(B) == Arrived(20, 100)
    assert Flows([B], pulls[2:]).progress(B) is None


def test_nobody_is_further_than_complete() -> None:
    assert Flows([B], [pull("a/0", "b/0", 500)]).progress(B) == Arrived(100, 100)
    assert [percent(fraction) for fraction in (0, 0.29, 0.999, 1)] == [
        "0 %",
        "29 %",
        "99 %",
        "100 %",
    ]


def test_an_instance_is_loaded_by_what_its_ranks_have_of_their_weights() -> None:
    one, two, three = (
        rank(f"b/{number}", loading=loading, manifest=ManifestRef("x", 1, 1, nbytes))
        for number, loading, nbytes in ((0, True, 100), (1, True, 100), (2, False, 200))
    )
    status = assess("b", [one, two, three])
    flows = Flows([one, two, three], [pull("a/0", "b/0", 8, of=10)])
    assert flows.loaded(status) == pytest.approx((80 + 0 + 200) / 400)
    assert instance_state(status, flows.loaded(status)) == "loading 70 %"
    assert loading_json(status, flows) == [
        {"rank": 0, "progress": {"nbytes": 8, "total_nbytes": 10}},
        {"rank": 1, "progress": None},
    ]
    assert instance_row(status, 0.7)[1] == "loading 70 %"


def test_without_a_ticket_it_is_not_known_how_much_is_loaded() -> None:
    nothing = Flows([A, B], [])
    assert instance_state(assess("b", [B]), nothing.loaded(assess("b", [B]))) == "loading"
    assert (rank_state(B, None), rank_state(A, Arrived(1, 2))) == ("loading", "ready")
    assert instance_state(assess("a", [A]), nothing.loaded(assess("a", [A]))) == "degraded"
    empty = rank("b/0", loading=True, manifest=ManifestRef("x", 1, 0, 0))
    assert Flows([empty], [pull("a/0", "b/0", 1)]).loaded(assess("b", [empty])) is None


# -- names
# --------------------------------------------------------------------------------------------------


def test_readers_are_named_with_how_far_they_are_and_the_rest_are_counted() -> None:
    pulls = [
        pull("a/0", "b/0", 63),
        pull("a/0", "host", 0),
        pull("a/0", "c/0", of=0),
        pull("d/1", "b/0", 63),
    ]
    assert read_by(pulls[:3]) == "b/0 63 %, c/0, host pid 7 0 %"
    assert reads_from([pulls[0], pulls[3], pulls[0]]) == "a/0, d/1"
    assert (reads_from([]), some_of("abcd"), some_of("abcdef")) == (
        "-",
        "a, b, c, d",
        "a, b, c, d and 2 more",
    )
    assert list(Flows([A, B], pulls).strangers()) == ["host pid 7", "c/0"]


def test_the_object_of_a_pull_keeps_its_fields() -> None:
    assert pull_json(pull("a/0", "b/0", 63, host="h", pid=5, began_at="2026-01-01")) == {
        "source": {"instance": "a", "rank": 0, "incarnation": "a/0"},
        "reader": {"instance": "b", "rank": 0, "incarnation": "b/0"},
        "host": "h",
        "pid": 5,
        "nbytes": 63,
        "total_nbytes": 100,
        "began_at": "2026-01-01",
    }
    assert pull_json(pull("a/0", "h"))["reader"] is None


# -- the tree
# --------------------------------------------------------------------------------------------------


def test_the_tree_has_complete_ranks_at_its_roots_and_below_each_its_readers() -> None:
    pulls = [pull("b/0", "c/0", 41), pull("a/0", "b/0", 63), pull("a/0", "host", 12)]
    assert drawn(Flows([A, B, C], pulls)) == [
        "a/0  ready",
        "  b/0  loading 63 %",
        "    c/0  loading 41 %",
        "  host pid 7  12 %",
    ]


def test_a_reader_of_several_stands_below_each_and_what_is_below_it_once() -> None:
    d = rank("d/0")
    pulls = [
        pull("a/0", "b/0", 63),
        pull("d/0", "b/0", 63),
        pull("d/0", "b/0", 63, revision=1),
        pull("b/0", "c/0", 41),
    ]
    assert drawn(Flows([A, B, C, d], pulls)) == [
        "a/0  ready",
        "  b/0  loading 63 %",
        "    c/0  loading 41 %",
        "d/0  ready",
        "  b/0  loading 63 %  (what reads from it stands elsewhere)",
    ]


def test_ranks_that_read_in_a_circle_or_from_themselves_are_drawn_once_around() -> None:
    pulls = [pull("b/0", "c/0", 1), pull("c/0", "b/0", 2), pull("a/0", "a/0", 3)]
    assert drawn(Flows([A, B, C], pulls)) == [
        "a/0  ready",
        "  a/0  ready  (what reads from it stands elsewhere)",
        "b/0  loading 2 %",
        "  c/0  loading 1 %",
        "    b/0  loading 2 %  (what reads from it stands elsewhere)",
    ]


def test_sources_and_readers_that_nobody_knows_are_named_by_what_the_ticket_says() -> None:
    assert drawn(Flows([], [pull("x/3", "y/0", 5)])) == ["x/3", "  y/0  5 %"]


def test_a_registration_that_had_the_rank_before_is_not_taken_for_the_one_that_has_it() -> None:
    before = replace(pull("a/0", "host", 5), incarnation="before")
    assert Flows([A], [before]).readers(A) == ()
    assert drawn(Flows([A], [before])) == ["a/0", "  host pid 7  5 %"]


def test_a_long_chain_is_moved_to_the_right_only_so_far_and_says_whom_it_reads_from_then() -> None:
    chain = [rank(f"n{number:03}/0", loading=True) for number in range(3_000)]
    pulls = [
        pull(f"{one.instance}/0", f"{two.instance}/0", 5) for one, two in itertools.pairwise(chain)
    ]
    lines = drawn(Flows(chain, pulls))
    assert len(lines) == 3_000
    assert max(map(len, lines)) < 150
    assert lines[33].strip() == "n033/0  loading 5 %  from n032/0"


def test_of_a_model_and_of_a_rank_only_what_hangs_together_with_it_is_drawn() -> None:
    other = rank("z/0", model=ModelIdentity("other"))
    pulls = [pull("a/0", "b/0", 63), pull("z/0", "host", 1), pull("d/0", "e/0", 9)]
    flows = Flows([A, B, rank("d/0"), other], pulls)
    assert drawn(flows.of_model(A.model)) == [
        "a/0  ready",
        "  b/0  loading 63 %",
        "d/0  ready",
        "  e/0  9 %",
    ]
    assert drawn(flows.of_model(other.model)) == ["z/0  ready", "  host pid 7  1 %"]
    assert drawn(flows.trees_with([B])) == ["a/0  ready", "  b/0  loading 63 %"]
    assert flows.trees_with([C]) == []


NAMES = [f"{instance}/{number}" for instance in "abcd" for number in range(2)]


@settings(max_examples=300, deadline=None)
@given(
    known=st.lists(st.sampled_from(NAMES), unique=True),
    edges=st.lists(
        st.tuples(st.sampled_from(NAMES), st.sampled_from([*NAMES, "host", "other"])), max_size=30
    ),
    loading=st.sets(st.sampled_from(NAMES)),
)
def test_whatever_tickets_say_the_tree_ends_and_has_each_pair_once(
    known: list[str], edges: list[tuple[str, str]], loading: set[str]
) -> None:
    flows = Flows(
        [rank(name, loading=name in loading) for name in known], [pull(*edge, 1) for edge in edges]
    )
    lines = flows.tree()
    path: list[str] = []
    pairs = []
    for line in lines:
        assert line.depth <= len(path)
        del path[line.depth :]
        if path:
            assert line.parent == path[-1]
            pairs.append((path[-1], line.name))
        path.append(line.name)
    named = {(source, reader if "/" in reader else f"{reader} pid 7") for source, reader in edges}
    assert sorted(pairs) == sorted(named)
    assert {line.name for line in lines} == {name for pair in named for name in pair}
    opened = [
        line.name
        for line in lines
        if not line.again and any(source == line.name for source, _ in named)
    ]
    assert len(opened) == len(set(opened))
