"""The spans of an evicted rank are forgotten, and all others stay."""

from __future__ import annotations

from typing import cast

import pytest

from engine_loader.errors import SourceEvicted
from engine_loader.planning.reads import Span
from engine_loader.transfer.received import Received
from engine_loader.transfer.shares import Share
from engine_registry import Pull, RankRecord, RankState, Registry
from engine_registry.errors import EtcdUnavailable
from engine_registry.schema.pull_ticket import Reader
from tests.support.builders import (
    CONTENT,
    OTHER_INCARNATION,
    a_manifest,
    a_pull,
    a_record,
    an_entry,
)

GOOD = a_record()
EVICTED = a_record(instance="bad", incarnation=OTHER_INCARNATION)
LOADING = a_record(instance="first", incarnation="ab" * 16, state=RankState.LOADING)
BEFORE_IT = a_record(instance="zeroth", incarnation="cd" * 16, state=RankState.LOADING)
FIRST, SECOND = Span(4096, 8, ((0, 0),)), Span(4104, 8, ((0, 8),))


class Etcd:
    """A registry in which EVICTED is not registered any more."""

    def __init__(self, *pulls: Pull, away: bool = False) -> None:
        self._pulls = pulls
        self._away = away

    def current(self, record: RankRecord) -> RankRecord | None:
        if self._away:
            raise EtcdUnavailable("etcd is away")
        return record if record != EVICTED else None

    def was_evicted(self, rank: RankRecord | Pull) -> bool:
        return rank.incarnation == EVICTED.incarnation

    def all_pulls(self) -> tuple[Pull, ...]:
        return self._pulls


@pytest.fixture
def received() -> Received:
    """Each of the ranks has brought a half."""
    received = Received(CONTENT, a_manifest(an_entry(addr=4096, nbytes=16)))
    received.add(GOOD, [FIRST])
    received.add(EVICTED, [SECOND])
    received.shares += [Share(GOOD.key, 8), Share(EVICTED.key, 8, SourceEvicted("evicted"))]
    return received


def test_all_that_ranks_have_brought_makes_tensors_whole(received: Received) -> None:
    assert (received.arrivals.nbytes, received.arrivals.complete()) == (16, ["w"])


def test_what_an_evicted_rank_has_brought_is_forgotten(received: Received) -> None:
    assert received.discard([EVICTED])
    assert (received.arrivals.nbytes, received.arrivals.complete()) == (8, [])
    assert sum(span.nbytes for span in received.arrivals.missing([FIRST, SECOND])) == 8
    assert [share.nbytes for share in received.shares] == [8, 0]
    assert not received.discard([EVICTED])
    received.evicted.append(EVICTED)
    received.discard([])
    received.find_evicted(cast(Registry, Etcd()), [])
    assert received.evicted == []  # else no other attempt could end well


def test_what_a_rank_with_another_content_brought_counts_until_it_or_a_witness_is_evicted() -> None:
    lender, witness = a_record(incarnation="ab" * 16), a_record(instance="w")
    for evicted, left in ((lender, {}), (EVICTED, {lender.key: 8})):
        received = Received(CONTENT, a_manifest(an_entry(addr=4096, nbytes=16)))
        received.borrow(lender, [witness], [FIRST])
        received.borrow(lender, [witness, EVICTED], [SECOND])
        assert received.lent == {lender.key: 16}
        assert received.arrivals.complete() == ["w"]
        assert received.held is None
        assert all(map(received.counts_on, [lender, witness, EVICTED]))
        assert received.discard([evicted])
        assert received.lent == left
        assert received.arrivals.nbytes == sum(left.values())


def test_what_was_there_counts_until_one_of_the_ranks_is_evicted_whose_tables_say_so() -> None:
    other = a_record(incarnation="ab" * 16)
    received = Received(CONTENT, a_manifest(an_entry(addr=4096, nbytes=16)))
    assert Received(CONTENT, a_manifest()).held is None
    received.hold([GOOD], [])
    assert not received.counts_on(GOOD)
    received.hold([GOOD], [FIRST])
    received.hold([EVICTED, other], [SECOND])
    received.compared = True
    assert received.held is not None
    assert (received.held.nbytes, received.arrivals.complete()) == (16, ["w"])
    assert all(map(received.counts_on, [GOOD, EVICTED, other]))
    assert received.discard([EVICTED])
    assert (received.held.nbytes, received.arrivals.nbytes) == (8, 8)
    assert not received.compared  # another rank may say the same
    assert received.counts_on(GOOD)
    assert not received.counts_on(EVICTED)


def test_a_rank_that_has_brought_nothing_takes_nothing_with_it(received: Received) -> None:
    assert not received.discard([a_record(incarnation="ab" * 16)])
    assert received.arrivals.nbytes == 16
    assert [share.nbytes for share in received.shares] == [8, 8]


@pytest.mark.parametrize(
    ("here", "found"),
    [([], [EVICTED]), ([EVICTED.incarnation], []), ([GOOD.incarnation], [EVICTED])],
    ids=["gone", "watched", "another watched"],
)
def test_ranks_that_were_evicted_since_are_looked_for_in_etcd(
    received: Received, here: list[str], found: list[RankRecord]
) -> None:
    received.find_evicted(cast(Registry, Etcd()), here)
    assert received.evicted == found


def test_without_etcd_what_has_come_counts(received: Received) -> None:
    received.find_evicted(cast(Registry, Etcd(away=True)), [])
    assert received.evicted == []


def reads(reader: RankRecord, source: RankRecord) -> Pull:
    return a_pull(
        instance=source.instance, incarnation=source.incarnation, reader=Reader.of(reader)
    )


@pytest.mark.parametrize(
    ("pulls", "found"),
    [
        ([], []),
        ([reads(LOADING, GOOD)], []),
        ([reads(GOOD, EVICTED)], []),
        ([reads(LOADING, EVICTED)], [LOADING]),
        ([reads(LOADING, BEFORE_IT), reads(BEFORE_IT, EVICTED)], [LOADING]),
        ([reads(LOADING, BEFORE_IT), reads(BEFORE_IT, LOADING)], []),
        ([reads(LOADING, BEFORE_IT), reads(BEFORE_IT, GOOD), reads(GOOD, BEFORE_IT)], []),
    ],
    ids=["nobody", "another", "of another", "it", "behind it", "in a circle", "before a circle"],
)
def test_a_rank_that_still_loads_from_an_evicted_one_is_as_evicted(
    pulls: list[Pull], found: list[RankRecord]
) -> None:
    received = Received(CONTENT, a_manifest(an_entry(addr=4096, nbytes=16)))
    received.add(GOOD, [FIRST])
    received.add(LOADING, [SECOND])
    received.find_evicted(cast(Registry, Etcd(*pulls)), [])
    assert received.evicted == found


def test_an_evicted_rank_takes_along_what_ranks_brought_that_were_loading(
    received: Received,
) -> None:
    third = Span(4112, 8, ((0, 16),))
    received.add(LOADING, [third])
    assert received.discard([EVICTED])
    assert sum(span.nbytes for span in received.arrivals.missing([FIRST, SECOND])) == 8
    assert received.arrivals.nbytes == 8
