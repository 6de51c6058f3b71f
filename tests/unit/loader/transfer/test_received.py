"""The spans of an evicted rank are forgotten, and all others stay."""

from __future__ import annotations

from typing import cast

import pytest

from engine_loader.errors import SourceEvicted
from engine_loader.planning.reads import Span
from engine_loader.transfer.received import Received
from engine_loader.transfer.shares import Share
from engine_registry import RankRecord, Registry
from engine_registry.errors import EtcdUnavailable
from tests.support.builders import CONTENT, OTHER_INCARNATION, a_manifest, a_record, an_entry

GOOD = a_record()
EVICTED = a_record(instance="bad", incarnation=OTHER_INCARNATION)
FIRST, SECOND = Span(4096, 8, ((0, 0),)), Span(4104, 8, ((0, 8),))


class Etcd:
    """A registry in which only GOOD is registered."""

    def __init__(self, *, away: bool = False) -> None:
        self._away = away

    def current(self, record: RankRecord) -> RankRecord | None:
        if self._away:
            raise EtcdUnavailable("etcd is away")
        return record if record == GOOD else None

    def was_evicted(self, record: RankRecord) -> bool:
        return record == EVICTED


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


def test_a_rank_that_has_brought_nothing_takes_nothing_with_it(received: Received) -> None:
    assert not received.discard([a_record(incarnation="ab" * 16)])
    assert received.arrivals.nbytes == 16
    assert [share.nbytes for share in received.shares] == [8, 8]


@pytest.mark.parametrize(
    ("here", "found"), [([], [EVICTED]), ([EVICTED.incarnation], [])], ids=["gone", "watched"]
)
def test_ranks_that_were_evicted_since_are_looked_for_in_etcd(
    received: Received, here: list[str], found: list[RankRecord]
) -> None:
    received.find_evicted(cast(Registry, Etcd()), here)
    assert received.evicted == found


def test_without_etcd_what_has_come_counts(received: Received) -> None:
    received.find_evicted(cast(Registry, Etcd(away=True)), [])
    assert received.evicted == []
