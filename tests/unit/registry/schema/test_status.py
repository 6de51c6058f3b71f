"""From the ranks that are there: is the instance complete and consistent, and if not, what is said
about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry import InstanceState, InstanceStatus, RankRecord, RankState
from engine_registry.errors import RecordDamaged
from engine_registry.schema.roster import Roster
from engine_registry.schema.status import spans
from tests.support.builders import a_record, stored

MODEL = a_record().model


def assess(
    instance: str, records: Sequence[RankRecord], damaged: Sequence[str] = ()
) -> InstanceStatus:
    """As a roster does that has seen all of them."""
    roster = Roster(instance)
    for record in records:
        roster.see(stored(record))
    for number, error in enumerate(damaged):
        roster.damage(f"/engines/{instance}/{number}", RecordDamaged(error))
    return roster.status()


def test_an_instance_with_all_ranks_alike_and_ready_is_ready() -> None:
    records = [a_record(rank=rank, world_size=3, topology={"pp": (rank, 3)}) for rank in (2, 0, 1)]
    status = assess("qwen", records)
    assert status.state is InstanceState.READY
    assert [record.rank for record in status.records] == [0, 1, 2]
    assert (status.missing, status.problems, status.summary) == ((), (), "")
    assert (status.world_size, status.model, status.version, status.nbytes) == (3, MODEL, 3, 48)


@pytest.mark.parametrize(
    ("present", "missing", "summary"),
    [
        ([0], (1, 2, 3), "missing ranks 1-3 of 4"),
        ([3], (0, 1, 2), "missing ranks 0-2 of 4"),
        ([0, 1, 3], (2,), "missing rank 2 of 4"),
        ([1, 2], (0, 3), "missing ranks 0,3 of 4"),
    ],
)
def test_missing_ranks_degrade_an_instance_and_are_listed(
    present: list[int], missing: tuple[int, ...], summary: str
) -> None:
    status = assess("qwen", [a_record(rank=rank, world_size=4) for rank in present])
    assert (status.state, status.missing, status.summary) == (
        InstanceState.DEGRADED,
        missing,
        summary,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"world_size": 4}, "rank 1 has world_size 4, rank 0 has 2"),
        ({"generation": "launch-2"}, "rank 1 has generation 'launch-2', rank 0 has 'launch-1'"),
        (
            {"model": replace(MODEL, name="llama")},
            "rank 1 has model.name 'llama', rank 0 has 'qwen'",
        ),
        (
            {"model": replace(MODEL, revision="r2")},
            "rank 1 has model.revision 'r2', rank 0 has 'r1'",
        ),
        (
            {"model": replace(MODEL, dtype="float16")},
            "rank 1 has model.dtype 'float16', rank 0 has 'bfloat16'",
        ),
        (
            {"model": replace(MODEL, quantization="fp8")},
            "rank 1 has model.quantization 'fp8', rank 0 has 'none'",
        ),
        (
            {"model": replace(MODEL, extra={})},
            "rank 1 has model.extra {}, rank 0 has {'layers': '28'}",
        ),
        (
            {"topology": {"tp": (1, 4)}},
            "rank 1 has topology sizes {'tp': 4}, rank 0 has {'pp': 1, 'tp': 2}",
        ),
        ({"version": 4}, "versions differ: 3 (rank 0), 4 (rank 1)"),
        ({"state": RankState.LOADING}, "rank 1 loading"),
        ({"state": RankState.UPDATING}, "rank 1 updating"),
        ({"state": RankState.DRAINING}, "rank 1 draining"),
    ],
)
def test_a_rank_that_differs_degrades_an_instance_with_both_values_named(
    changes: dict[str, Any], said: str
) -> None:
    status = assess("qwen", [a_record(rank=0), a_record(rank=1, **changes)])
    assert status.state is InstanceState.DEGRADED
    assert status.problems == (said,)
    assert said in status.summary
    assert (status.version is None) == ("versions" in said)


def test_every_problem_is_listed_not_only_the_first() -> None:
    records = [
        a_record(rank=0, world_size=4),
        a_record(rank=3, world_size=4, version=9, state=RankState.LOADING, generation="g"),
    ]
    summary = assess("qwen", records, ["the record at /engines/qwen/2 is damaged"]).summary
    assert summary == (
        "missing ranks 1-2 of 4; the record at /engines/qwen/2 is damaged; rank 3 has "
        "generation 'g', rank 0 has 'launch-1'; "
        "versions differ: 3 (rank 0), 9 (rank 3); rank 3 loading"
    )


def test_one_rank_of_many_gives_the_model_and_the_size_of_its_instance() -> None:
    status = assess("qwen", [a_record(rank=2, world_size=4)])
    found = (status.instance, status.world_size, status.model, status.version)
    assert found == ("qwen", 4, MODEL, 3)


def test_ranks_in_one_state_are_reported_together() -> None:
    records = [
        a_record(rank=rank, world_size=4, state=RankState.LOADING if rank else RankState.READY)
        for rank in range(4)
    ]
    assert assess("qwen", records).problems == ("ranks 1-3 loading",)


@pytest.mark.parametrize("records", [[], [a_record(rank=0)]])
def test_damage_degrades_an_instance_even_where_nothing_else_is_left(records: list[Any]) -> None:
    status = assess("qwen", records, ["it is damaged"])
    assert status.state is InstanceState.DEGRADED
    assert "it is damaged" in status.problems


def test_ranks_that_have_ended_do_not_count() -> None:
    ended = a_record(rank=1, ended="withdrawn")
    status = assess("qwen", [a_record(rank=0), ended])
    assert (status.state, status.missing) == (InstanceState.DEGRADED, (1,))
    assert assess("qwen", [ended]).state is InstanceState.GONE


def test_an_instance_without_ranks_is_gone_and_knows_nothing_of_itself() -> None:
    status = assess("qwen", [])
    assert status.instance == "qwen"
    assert (status.state, status.world_size, status.model, status.version, status.nbytes) == (
        InstanceState.GONE,
        0,
        None,
        None,
        0,
    )
    assert status.summary == ""


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([], ""),
        ([0], "0"),
        ([0, 1], "0-1"),
        ([7, 0, 2, 1, 3], "0-3,7"),
        ([0, 2, 4], "0,2,4"),
        ([9, 10, 11, 99], "9-11,99"),
    ],
)
def test_spans_are_written_as_first_and_last(ranks: Sequence[int], text: str) -> None:
    assert spans(ranks) == text


@given(st.sets(st.integers(0, 200)))
def test_spans_read_back_as_the_same_ranks(ranks: set[int]) -> None:
    found: set[int] = set()
    for piece in filter(None, spans(sorted(ranks)).split(",")):
        first, _, last = piece.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    assert found == ranks
