"""Which registrations are doomed by a loss, and when."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from registry import Event, InstanceDegraded, InstanceGone, InstanceReady, RankJoined, RankLost, RankRecord
from registry.cleanup import Doomed, Grace
from registry.resolver import assess
from tests.builders import a_record

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


def test_a_loss_dooms_the_ranks_that_are_left_when_the_grace_is_over() -> None:
    grace = watching()
    feed(grace, 10.0, RankLost(RANKS[0], "process ended"), DEGRADED)
    assert grace.due == 40.0
    assert grace.expired(39.9) == []
    assert grace.expired(40.0) == [Doomed("qwen", 40.0, RANKS[0], ids(RANKS[1:]))]
    assert grace.expired(99.0) == []


@pytest.mark.parametrize("saved_by", [[RankJoined(successor(RANKS[0])), READY], [GONE]], ids=["ready again", "gone"])
def test_an_instance_that_is_ready_again_or_gone_is_not_doomed(saved_by: list[Event]) -> None:
    grace = watching()
    feed(grace, 10.0, RankLost(RANKS[0], "process ended"), DEGRADED)
    feed(grace, 20.0, *saved_by)
    assert grace.due is None
    assert grace.expired(99.0) == []


def test_ranks_that_come_after_the_loss_are_not_doomed_by_it() -> None:
    grace = watching()
    feed(grace, 10.0, RankLost(RANKS[0], "process ended"), RankLost(RANKS[1], "process ended"), DEGRADED)
    feed(grace, 20.0, RankJoined(successor(RANKS[0])))
    (doomed,) = grace.expired(40.0)
    assert doomed.incarnations == ids(RANKS[2:])


def test_the_loss_of_the_last_rank_dooms_nobody() -> None:
    grace = watching()
    feed(grace, 10.0, *[RankLost(record, "process ended") for record in RANKS], GONE)
    assert grace.expired(99.0) == []
    assert vars(grace) == vars(Grace(GRACE_S))


def test_an_instance_that_was_never_complete_is_left_alone() -> None:
    grace = Grace(GRACE_S)
    feed(grace, 0.0, RankJoined(RANKS[1]), DEGRADED)
    assert grace.due is None


def test_what_was_postponed_comes_again_unless_it_was_saved_meanwhile() -> None:
    grace = watching()
    feed(grace, 10.0, RankLost(RANKS[0], "process ended"), DEGRADED)
    (doomed,) = grace.expired(40.0)
    grace.postpone(doomed, 40.0)
    assert grace.due is not None
    assert grace.due > 40.0
    (again,) = grace.expired(grace.due)
    assert (again.lost, again.incarnations) == (doomed.lost, doomed.incarnations)
    grace.postpone(doomed, 50.0)
    feed(grace, 50.1, READY)
    assert grace.expired(999.0) == []


def test_a_rank_that_was_replaced_at_once_does_not_shorten_the_grace_of_the_next_loss() -> None:
    grace = watching()
    feed(grace, 10.0, RankLost(RANKS[0], "replaced by another process"), RankJoined(successor(RANKS[0])))
    feed(grace, 35.0, RankLost(RANKS[1], "process ended"), DEGRADED)
    assert grace.due == 65.0


def test_a_newcomer_is_not_doomed_by_the_grace_of_a_loss_before_it_came() -> None:
    grace = watching()
    feed(grace, 10.0, RankLost(RANKS[0], "process ended"), RankLost(RANKS[1], "process ended"), DEGRADED)
    feed(grace, 38.0, RankJoined(successor(RANKS[0])), RankLost(RANKS[2], "process ended"))
    doomed = [incarnation for told in grace.expired(40.0) for incarnation in told.incarnations]
    assert RANKS[3].incarnation in doomed
    assert successor(RANKS[0]).incarnation not in doomed
