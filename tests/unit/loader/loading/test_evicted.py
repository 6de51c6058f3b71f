"""What evicted ranks have brought does not count, and what any other has brought does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from engine_loader.errors import SourceEvicted, SourceLost
from engine_loader.loading.evicted import check_registered, discard_evicted
from engine_loader.planning.reads import Span
from engine_loader.sources.source import SourceRank
from engine_loader.transfer.received import Received
from engine_loader.transfer.shares import Share
from engine_registry import RankRecord, Registry
from tests.support.builders import CONTENT, OTHER_INCARNATION, a_manifest, a_record, an_entry

ONE = a_record(instance="one")
TWO = a_record(instance="two", incarnation=OTHER_INCARNATION)
BEFORE = a_record(instance="before", incarnation="ab" * 16)
FIRST, SECOND = Span(4096, 8, ((0, 0),)), Span(4104, 8, ((0, 8),))


class Etcd:
    """A registry in which these ranks have been evicted."""

    def __init__(self, *evicted: RankRecord) -> None:
        self._evicted = evicted
        self.asked: list[str] = []

    def current(self, record: RankRecord) -> RankRecord | None:
        self.asked.append(record.instance)
        return None if record in self._evicted else record

    def was_evicted(self, record: RankRecord) -> bool:
        return record in self._evicted


def source(record: RankRecord, registered: bool = True, evicted: bool = False) -> SourceRank:
    return cast(
        SourceRank,
        SimpleNamespace(
            record=record, is_registered=lambda: registered, was_evicted=lambda: evicted
        ),
    )


@pytest.fixture
def received() -> Received:
    return Received(CONTENT, a_manifest(an_entry(addr=4096, nbytes=16)))


def check(received: Received, sources: list[SourceRank], shares: list[Share]) -> None:
    check_registered(cast(Registry, Etcd()), received, sources, shares)


def test_an_evicted_source_does_not_count_that_has_only_said_what_was_there(
    received: Received,
) -> None:
    received.hold([ONE], [FIRST])
    share = Share(ONE.key, 0)
    with pytest.raises(SourceEvicted, match=ONE.key):
        check(received, [source(ONE, registered=False, evicted=True)], [share])
    assert discard_evicted(received, [source(ONE)], [share])
    assert received.arrivals.nbytes == 0


@pytest.mark.parametrize(
    ("registered", "evicted", "nbytes"),
    [(True, True, 8), (True, False, 8), (False, False, 8), (False, True, 0)],
    ids=["news come late", "it is there", "it left", "it has brought nothing"],
)
def test_a_source_counts_unless_it_has_brought_something_and_was_evicted(
    received: Received, registered: bool, evicted: bool, nbytes: int
) -> None:
    shares = [Share(ONE.key, nbytes)]
    check(received, [source(ONE, registered, evicted)], shares)
    assert shares == [Share(ONE.key, nbytes)]


def test_every_evicted_source_is_found_and_the_error_is_of_the_first(received: Received) -> None:
    sources = [source(ONE, registered=False, evicted=True), source(BEFORE)]
    sources.append(source(TWO, registered=False, evicted=True))
    shares = [Share(ONE.key, 8), Share(BEFORE.key, 4), Share(TWO.key, 4)]
    with pytest.raises(SourceEvicted, match="/engines/one/0 was evicted meanwhile") as caught:
        check(received, sources, shares)
    assert caught.value.details["key"] == ONE.key
    assert shares[0].error is caught.value
    assert isinstance(shares[2].error, SourceEvicted)
    assert shares[1].error is None


def test_a_source_that_was_lost_is_none_that_was_evicted(received: Received) -> None:
    check(received, [source(ONE)], [Share(ONE.key, 8, SourceLost("gone"))])
    check(received, [source(ONE)], [Share(ONE.key, 0, SourceEvicted("evicted"))])


def test_a_rank_that_brought_something_in_an_attempt_before_is_asked_for_in_etcd(
    received: Received,
) -> None:
    received.add(BEFORE, [FIRST])
    received.add(ONE, [SECOND])
    etcd = Etcd(BEFORE, ONE)
    with pytest.raises(SourceEvicted, match="what /engines/before/0 has brought") as caught:
        check_registered(cast(Registry, etcd), received, [source(ONE)], [Share(ONE.key, 8)])
    assert caught.value.details["key"] == BEFORE.key
    assert etcd.asked == ["before"]  # those of this attempt have said it themselves


def test_what_evicted_ranks_have_brought_is_forgotten_in_this_attempt_and_before(
    received: Received,
) -> None:
    received.add(BEFORE, [FIRST])
    received.add(ONE, [SECOND])
    shares = [Share(ONE.key, 8, SourceEvicted("evicted")), Share(TWO.key, 4, SourceLost("gone"))]
    assert discard_evicted(received, [source(ONE), source(TWO)], shares)
    assert [share.nbytes for share in shares] == [0, 4]
    assert received.arrivals.nbytes == 8
    received.evicted.append(BEFORE)
    assert discard_evicted(received, [source(TWO)], shares[1:])
    assert received.arrivals.nbytes == 0


def test_nothing_is_forgotten_where_nobody_was_evicted(received: Received) -> None:
    received.add(ONE, [FIRST])
    shares = [Share(ONE.key, 8, SourceLost("gone"))]
    assert not discard_evicted(received, [source(ONE)], shares)
    assert (received.arrivals.nbytes, shares[0].nbytes) == (8, 8)
