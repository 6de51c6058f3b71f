"""Which registrations are evicted because of a loss, when, and the note of it."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from types import FunctionType, ModuleType

import pytest

from engine_registry import (
    Event,
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    RankJoined,
    RankLost,
    RankRecord,
)
from engine_registry.errors import RecordDamaged, SchemaUnsupported
from engine_registry.schema.eviction_note import EvictionNote
from engine_registry.watching.grace_period import DueEviction, Grace
from tests.support.assessment import assess
from tests.support.builders import a_record

GRACE_S = 30.0
RANKS = [a_record(rank=rank, world_size=4, incarnation=f"{rank:032x}") for rank in range(4)]
READY = InstanceReady(assess("qwen", RANKS))
DEGRADED = InstanceDegraded(assess("qwen", RANKS[1:]))
GONE = InstanceGone(assess("qwen", []))


def successor(record: RankRecord) -> RankRecord:
    return a_record(rank=record.rank, world_size=4, incarnation=f"{record.rank + 100:032x}")


def ids(records: Iterable[RankRecord]) -> frozenset[str]:
    return frozenset(record.incarnation for record in records)


def watching(grace_s: float = GRACE_S) -> Grace:
    """All ranks are there since 0 s."""
    grace = Grace(grace_s)
    feed(grace, 0.0, *map(RankJoined, RANKS), READY)
    return grace


def feed(grace: Grace, now: float, *events: Event) -> None:
    for event in events:
        grace.feed(event, now)


def test_a_loss_evicts_the_ranks_that_are_left_when_the_grace_is_over() -> None:
    grace = watching()
    feed(grace, 10.0, RankLost(RANKS[0], "process ended"), DEGRADED)
    assert grace.due == 40.0
    assert grace.expired(39.9) == []
    assert grace.expired(40.0) == [
        DueEviction("qwen", RANKS[0], ids(RANKS[1:]), unseen=False, until=40.0)
    ]


def test_an_eviction_that_is_due_is_reported_again_until_it_is_settled() -> None:
    grace = watching()
    feed(grace, 10.0, RankLost(RANKS[0], "process ended"), DEGRADED)
    (eviction,) = grace.expired(40.0)
    assert grace.expired(40.0) == []
    soon = grace.due or 0.0
    assert soon > 40.0
    (again,) = grace.expired(soon)
    assert (again.lost, again.incarnations) == (eviction.lost, eviction.incarnations)
    grace.settle(again)
    assert grace.due is None
    assert grace.expired(999.0) == []


def test_repeated_reports_stop_when_the_instance_is_ready() -> None:
    grace = watching()
    feed(grace, 10.0, RankLost(RANKS[0], "process ended"), DEGRADED)
    assert grace.expired(40.0)
    feed(grace, 50.1, READY)
    assert grace.due is None
    assert grace.expired(999.0) == []


def test_settling_one_loss_leaves_a_later_one_its_time() -> None:
    grace = watching()
    feed(grace, 10.0, RankLost(RANKS[0], "process ended"), DEGRADED)
    feed(grace, 10.5, RankLost(RANKS[1], "process ended"))
    (first,) = grace.expired(40.0)
    grace.settle(first)
    assert grace.due == 40.5
    (second,) = grace.expired(40.5)
    assert (second.lost, second.incarnations) == (RANKS[1], ids(RANKS[2:]))


def test_of_several_losses_that_are_over_all_are_settled_at_once() -> None:
    grace = watching()
    feed(
        grace,
        10.0,
        RankLost(RANKS[0], "process ended"),
        RankLost(RANKS[1], "process ended"),
        DEGRADED,
    )
    (eviction,) = grace.expired(40.0)
    assert (eviction.lost, eviction.incarnations) == (RANKS[0], ids(RANKS[2:]))
    grace.settle(eviction)
    assert grace.due is None


@pytest.mark.parametrize(
    "saved_by", [[RankJoined(successor(RANKS[0])), READY], [GONE]], ids=["ready again", "gone"]
)
def test_an_instance_that_is_ready_again_or_gone_is_not_evicted(saved_by: list[Event]) -> None:
    grace = watching()
    feed(grace, 10.0, RankLost(RANKS[0], "process ended"), DEGRADED)
    feed(grace, 20.0, *saved_by)
    assert grace.due is None
    assert grace.expired(99.0) == []


def test_ranks_that_come_after_the_loss_are_not_evicted_by_it() -> None:
    grace = watching()
    feed(
        grace,
        10.0,
        RankLost(RANKS[0], "process ended"),
        RankLost(RANKS[1], "process ended"),
        DEGRADED,
    )
    feed(grace, 20.0, RankJoined(successor(RANKS[0])))
    (eviction,) = grace.expired(40.0)
    assert eviction.incarnations == ids(RANKS[2:])


def test_a_registration_that_comes_back_itself_is_as_old_as_it_was() -> None:
    grace = watching()
    feed(grace, 10.0, RankLost(RANKS[0], "process ended"), DEGRADED)
    feed(grace, 11.0, RankLost(RANKS[1], "lease expired or key deleted"), RankJoined(RANKS[1]))
    (eviction,) = grace.expired(40.0)
    assert eviction.incarnations == ids(RANKS[1:])


def test_of_an_instance_that_is_gone_nothing_is_remembered() -> None:
    grace = watching()
    feed(grace, 10.0, *[RankLost(record, "process ended") for record in RANKS], GONE)
    assert grace.expired(99.0) == []
    assert grace.next_note() is None
    assert (grace._instances, grace._agenda) == ({}, [])


def test_an_instance_that_comes_and_goes_for_ever_costs_no_more_memory() -> None:
    grace = watching()
    for second in range(100):
        feed(
            grace,
            float(second),
            RankLost(RANKS[0], "process ended"),
            DEGRADED,
            RankJoined(RANKS[0]),
            READY,
        )
        assert grace.due is None or second - GRACE_S < grace.due
    assert len(grace._agenda) <= 1


def test_losing_nearly_all_ranks_takes_memory_for_each_loss_but_not_for_each_pair() -> None:
    few, many = (held_after_losing_all_but_one_of(count) for count in (100, 400))
    assert many < 8 * few


def held_after_losing_all_but_one_of(count: int) -> int:
    """References between objects, from the grace on."""
    grace = Grace(GRACE_S)
    records = [
        a_record(rank=rank, world_size=count, incarnation=f"{rank:032x}") for rank in range(count)
    ]
    feed(grace, 0.0, *map(RankJoined, records))
    feed(grace, 1.0, *[RankLost(record, "process ended") for record in records[1:]])
    references, seen, todo = 0, set[int](), list[object]([grace])
    while todo:
        each = todo.pop()
        if id(each) not in seen and not isinstance(each, type | FunctionType | ModuleType):
            seen.add(id(each))
            found = gc.get_referents(each)
            references += len(found)
            todo += found
    return references


def test_an_instance_that_nobody_saw_complete_is_evicted_only_by_a_note() -> None:
    grace = Grace(GRACE_S)
    feed(grace, 0.0, RankJoined(RANKS[1]), DEGRADED)
    assert grace.next_note() is None
    (eviction,) = grace.expired(30.0)
    assert eviction == DueEviction("qwen", None, frozenset(), unseen=True, until=30.0)
    grace.settle(eviction)
    assert grace.due is None


def test_a_loss_in_an_instance_that_was_incomplete_before_evicts_by_itself_and_by_the_note() -> (
    None
):
    grace = Grace(GRACE_S)
    feed(grace, 0.0, *map(RankJoined, RANKS[1:]), DEGRADED)
    feed(grace, 1.0, RankLost(RANKS[1], "process ended"))
    (eviction,) = grace.expired(31.0)
    assert eviction == DueEviction("qwen", RANKS[1], ids(RANKS[2:]), unseen=True, until=31.0)


def test_an_instance_that_is_degraded_with_all_its_ranks_there_evicts_nothing() -> None:
    grace = Grace(GRACE_S)
    feed(
        grace,
        0.0,
        *map(RankJoined, RANKS),
        InstanceDegraded(assess("qwen", [*RANKS[:3], a_record(rank=3, world_size=4, version=9)])),
    )
    assert grace.due is None


def test_the_first_loss_is_noted_once_with_the_ranks_that_stand() -> None:
    grace = watching()
    assert grace.next_note() is None
    feed(grace, 10.0, RankLost(RANKS[0], "process ended"), DEGRADED)
    assert grace.next_note() == EvictionNote(RANKS[0], ids(RANKS[1:]))
    feed(grace, 11.0, RankLost(RANKS[1], "process ended"))
    assert grace.next_note() is None
    assert not grace.has_notes


@pytest.mark.parametrize(
    "saved_by", [[RankJoined(successor(RANKS[0]))], [RankJoined(successor(RANKS[0])), READY]]
)
def test_an_eviction_that_is_called_off_is_not_noted_and_the_next_one_is(
    saved_by: list[Event],
) -> None:
    grace = watching()
    feed(grace, 10.0, RankLost(RANKS[0], "process ended"), DEGRADED, *saved_by)
    assert not grace.has_notes
    assert grace.next_note() is None
    feed(grace, 20.0, RankLost(RANKS[1], "process ended"))
    assert grace.next_note() == EvictionNote(RANKS[1], ids([successor(RANKS[0]), *RANKS[2:]]))


def test_a_note_reads_back_as_it_is() -> None:
    note = EvictionNote(RANKS[0], ids(RANKS[1:]))
    assert EvictionNote.decode("/eviction-notes/qwen", note.encode()) == note


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (b"", RecordDamaged),
        (b"[]", RecordDamaged),
        (b'"schema"', RecordDamaged),
        (b'{"schema":"1"}', RecordDamaged),
        (b'{"schema":1}', RecordDamaged),
        (
            b'{"schema":1,"lost":{"key":"/engines/a/0","record":"{}"},"incarnations":[]}',
            RecordDamaged,
        ),
        (b'{"schema":3}', SchemaUnsupported),
    ],
)
def test_a_note_that_cannot_be_read_says_which_key(value: bytes, kind: type[RecordDamaged]) -> None:
    with pytest.raises(kind, match=r"/eviction-notes/qwen|/engines/a/0"):
        EvictionNote.decode("/eviction-notes/qwen", value)


def test_a_rank_that_was_replaced_at_once_does_not_shorten_the_grace_of_the_next_loss() -> None:
    grace = watching()
    feed(
        grace,
        10.0,
        RankLost(RANKS[0], "replaced by another process"),
        RankJoined(successor(RANKS[0])),
    )
    feed(grace, 35.0, RankLost(RANKS[1], "process ended"), DEGRADED)
    assert grace.due == 65.0


def test_a_newcomer_is_not_evicted_by_the_grace_of_a_loss_before_it_came() -> None:
    grace = watching()
    feed(
        grace,
        10.0,
        RankLost(RANKS[0], "process ended"),
        RankLost(RANKS[1], "process ended"),
        DEGRADED,
    )
    feed(grace, 38.0, RankJoined(successor(RANKS[0])), RankLost(RANKS[2], "process ended"))
    eviction = [incarnation for due in grace.expired(40.0) for incarnation in due.incarnations]
    assert RANKS[3].incarnation in eviction
    assert successor(RANKS[0]).incarnation not in eviction
