"""Tickets to read from several ranks of a real etcd, and the watch that begins where they were
taken.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import pytest

from engine_registry import (
    Event,
    RankJoined,
    RankLost,
    RankRecord,
    RankState,
    RankUpdated,
    Registry,
)
from engine_registry.pulls.taking import FEW
from tests.support.ranks import register
from tests.support.waiting import wait_until


@pytest.fixture
def ranks(registry: Registry) -> Iterator[list[RankRecord]]:
    """One rank of each of four instances."""
    with ExitStack() as stack:
        for name in "abcd":
            stack.enter_context(register(registry, name))
        yield [registry.ranks(name)[0] for name in "abcd"]


def count(registry: Registry, ranks: list[RankRecord]) -> list[int]:
    return list(registry.count_pulls(ranks).values())


def test_a_load_takes_and_gives_back_tickets_for_several_ranks_at_once(
    registry: Registry, ranks: list[RankRecord]
) -> None:
    revision, _ = registry._etcd.read([])
    with closing(registry.pulling()) as first, closing(registry.pulling()) as second:
        ours = first.take(ranks[:2], free_since=revision, among=ranks)
        theirs = second.take(ranks, free_since=revision, among=ranks)
        assert (ours.records, theirs.records) == (tuple(ranks[:2]), tuple(ranks[2:]))
        assert theirs.faster == {one.incarnation for one in ranks[:2]}
        assert theirs.readers == {one.incarnation: int(one in ranks[:2]) for one in ranks}
        assert count(registry, ranks) == [1] * 4
        changed = replace(ranks[0], mod_revision=ranks[0].mod_revision - 1)
        assert first.take([changed]).records == ()
        for each in (ours, theirs):
            assert each.ticket is not None
            each.ticket.close()
        assert count(registry, ranks) == [0] * 4


def test_of_many_that_are_free_once_each_is_taken_by_one_load(
    registry: Registry, ranks: list[RankRecord]
) -> None:
    revision, _ = registry._etcd.read([])
    with ExitStack() as stack:
        together = threading.Barrier(8)
        taken: list[str] = []

        def take() -> None:
            pulling = stack.enter_context(closing(registry.pulling()))
            together.wait(60)
            given = pulling.take(ranks, free_since=revision)
            taken.extend(record.key for record in given.records)
            if given.ticket is not None:
                stack.enter_context(given.ticket)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(taken) == [one.key for one in ranks]


@pytest.mark.parametrize("known", [False, True])
def test_the_watch_of_several_ranks_misses_nothing_since_their_tickets_were_taken(
    registry: Registry, known: bool
) -> None:
    events: queue.Queue[Event] = queue.Queue()
    with ExitStack() as stack:
        held = {name: stack.enter_context(register(registry, name)) for name in "abcd"}
        ranks = [registry.ranks(name)[0] for name in "abcd"]
        taken = stack.enter_context(closing(registry.pulling())).take(ranks)
        assert taken.ticket is not None
        stack.enter_context(taken.ticket)
        if known:
            held["b"].update(state=RankState.UPDATING)
        watch = registry.watch_ranks(ranks, taken.snapshot if known else None)
        stack.enter_context(closing(watch.call(events.put)))
        joined = [events.get(timeout=60) for _ in ranks]
        assert joined == [RankJoined(record) for record in ranks]
        if not known:
            held["b"].update(state=RankState.UPDATING)
        event = events.get(timeout=60)
        assert isinstance(event, RankUpdated)
        assert event.record.key == ranks[1].key
        held["d"].withdraw()
        event = events.get(timeout=60)
        assert isinstance(event, RankLost)
        assert (event.record.key, event.reason) == (ranks[3].key, "withdrawn")


def test_many_ranks_of_one_instance_are_watched_as_one(registry: Registry) -> None:
    seen: list[Event] = []
    with ExitStack() as stack:
        size = FEW + 1
        held = [stack.enter_context(register(registry, "w", rank, size)) for rank in range(size)]
        ranks = list(registry.ranks("w"))
        watch = stack.enter_context(registry.watch_ranks(ranks).call(seen.append))
        assert watch._follower.name == "/engines/w/"
        wait_until(lambda: len(seen) == size)
        held[-1].withdraw()
        wait_until(lambda: len(seen) > size)
        assert isinstance(seen[-1], RankLost)
