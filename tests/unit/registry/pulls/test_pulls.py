"""Pull tickets: issued while the record stands, also where etcd's first answer was lost; what they
say, and who sees it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from socket import gethostname

import pytest

from engine_registry import Pull, RankRecord
from engine_registry.errors import EtcdRefused, InvalidField
from engine_registry.pulls.follow import AllPulls
from engine_registry.pulls.queries import all_pulls, count_pulls, readers_of
from engine_registry.pulls.ticket import PullTicket, take_ticket
from engine_registry.schema.keyvalue import Deletion, KeyValue, Put, Snapshot
from engine_registry.schema.pull_ticket import Reader
from engine_registry.schema.pull_ticket import encode as encode_pull
from engine_registry.schema.record_format import decode, encode
from tests.support.builders import OTHER_INCARNATION, a_pull, a_record, ticket
from tests.support.fake_etcd import FakeEtcd
from tests.support.feed import Feed
from tests.support.waiting import wait_until

OURS = a_record()


@pytest.fixture
def etcd() -> FakeEtcd:
    return FakeEtcd()


@pytest.fixture
def read(etcd: FakeEtcd) -> RankRecord:
    """The record as it stands."""
    etcd.commit([], [Put(OURS.key, encode(OURS), etcd.grant(10))])
    item = etcd.get(OURS.key)
    assert item is not None
    return decode(item.key, item.value, item.mod_revision)


@pytest.mark.parametrize("answer_lost", [False, True])
def test_a_ticket_counts_until_it_is_given_back(
    etcd: FakeEtcd, read: RankRecord, answer_lost: bool
) -> None:
    etcd.retry_next_commit = answer_lost
    ticket = take_ticket(etcd, read)
    assert ticket is not None
    with ticket:
        assert count_pulls(etcd, [read]) == {read.incarnation: 1}
    assert count_pulls(etcd, [read]) == {read.incarnation: 0}


@pytest.mark.parametrize("answer_lost", [False, True])
def test_a_ticket_for_a_rank_that_is_to_be_free_is_given_once(
    etcd: FakeEtcd, read: RankRecord, answer_lost: bool
) -> None:
    revision, _ = etcd.read([])
    etcd.retry_next_commit = answer_lost
    ticket = take_ticket(etcd, read, free_since=revision)
    assert ticket is not None
    leases = etcd.leases
    assert take_ticket(etcd, read, free_since=revision) is None
    assert etcd.leases == leases
    ticket.close()
    another = take_ticket(etcd, read, free_since=revision)  # the place is free again
    assert another is not None
    another.close()


def test_a_record_that_has_changed_gives_no_ticket(etcd: FakeEtcd, read: RankRecord) -> None:
    etcd.put(OURS.key, encode(replace(OURS, version=4)))
    leases = etcd.leases
    assert take_ticket(etcd, read) is None
    assert etcd.leases == leases


# -- how far a load is
# --------------------------------------------------------------------------------------------------


def progress_in(etcd: FakeEtcd) -> list[tuple[int, int]]:
    return [(pull.nbytes, pull.total_nbytes) for pull in all_pulls(etcd)]


@pytest.fixture
def held(etcd: FakeEtcd, read: RankRecord, monkeypatch: pytest.MonkeyPatch) -> Iterator[PullTicket]:
    monkeypatch.setattr("engine_registry.pulls.ticket._REPORT_S", 0.001)
    ticket = take_ticket(etcd, read)
    assert ticket is not None
    with ticket:
        yield ticket


def test_a_ticket_says_who_reads_and_for_whom(etcd: FakeEtcd, read: RankRecord) -> None:
    other = a_record(instance="b", rank=1, incarnation=OTHER_INCARNATION)
    for reader in (None, other):
        ticket = take_ticket(etcd, read, reader)
        assert ticket is not None
        with ticket:
            (pull,) = readers_of(etcd, read)
            assert (pull.key, pull.incarnation, pull.host, pull.pid) == (
                ticket._key,
                read.incarnation,
                gethostname(),
                os.getpid(),
            )
            assert pull.reader == (Reader("b", 1, OTHER_INCARNATION) if reader else None)
            assert pull.began_at.endswith("Z")
            assert pull.fraction is None
            assert pull.create_revision > 0


def test_the_progress_of_a_ticket_is_written_and_only_when_it_changes(
    etcd: FakeEtcd, held: PullTicket
) -> None:
    held.report(5, 10)
    wait_until(lambda: progress_in(etcd) == [(5, 10)])
    writes = len(etcd.history)
    held.report(5, 10)
    held.report(7, 10)
    wait_until(lambda: progress_in(etcd) == [(7, 10)])
    assert len(etcd.history) == writes + 1


def test_reporting_waits_for_nothing(
    etcd: FakeEtcd, read: RankRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_registry.pulls.ticket._REPORT_S", 1_000)
    ticket = take_ticket(etcd, read)
    assert ticket is not None
    writes = len(etcd.history)
    etcd.available = False
    for nbytes in range(1_000):
        ticket.report(nbytes, 1_000)
    assert (len(etcd.history), etcd.refused) == (writes, 0)
    etcd.available = True
    ticket.close()


@pytest.mark.parametrize("how", ["expired", "deleted"])
def test_a_ticket_that_has_gone_does_not_come_back(
    etcd: FakeEtcd, held: PullTicket, how: str
) -> None:
    if how == "expired":
        etcd.expire(held._lease_id)
    else:
        etcd.delete(held._key)
    held.report(5, 10)
    wait_until(lambda: held._written is None or not held._thread.is_alive())
    held.report(6, 10)
    assert progress_in(etcd) == []


def test_a_ticket_goes_on_after_an_answer_that_was_lost(etcd: FakeEtcd, held: PullTicket) -> None:
    etcd.retry_next_commit = True
    held.report(5, 10)
    wait_until(lambda: progress_in(etcd) == [(5, 10)])
    held.report(6, 10)
    wait_until(lambda: progress_in(etcd) == [(6, 10)])


def test_an_etcd_that_takes_no_progress_is_not_asked_again_and_the_ticket_stays(
    etcd: FakeEtcd, held: PullTicket
) -> None:
    etcd.full = True
    held.report(5, 10)
    wait_until(lambda: held._written is None)
    etcd.full = False
    held.report(6, 10)
    assert held._thread.is_alive()
    assert progress_in(etcd) == [(0, 0)]


def test_progress_is_reported_when_etcd_is_back(etcd: FakeEtcd, held: PullTicket) -> None:
    etcd.available = False
    held.report(5, 10)
    wait_until(lambda: etcd.refused > 1)
    etcd.available = True
    wait_until(lambda: progress_in(etcd) == [(5, 10)])


# -- who reads
# --------------------------------------------------------------------------------------------------


def test_readers_are_those_of_this_registration_and_pulls_those_of_an_instance_or_all(
    etcd: FakeEtcd, read: RankRecord
) -> None:
    ours, before, other = (
        a_pull(),
        a_pull(load_id="old", incarnation=OTHER_INCARNATION),
        a_pull(instance="qwen-b"),
    )
    for pull in (ours, before, other):
        etcd.put(pull.key, encode_pull(pull))
    for nonsense in ("/pulls/qwen/0/x", "/pulls/qwen/0/y/z", "/pulls/"):
        etcd.put(nonsense, b"{")

    def ids(pulls: Iterable[Pull]) -> list[str]:
        return [f"{pull.instance} {pull.load_id}" for pull in pulls]

    assert ids(readers_of(etcd, read)) == ["qwen load-1"]
    assert ids(all_pulls(etcd, "qwen")) == ["qwen load-1", "qwen old"]
    assert ids(all_pulls(etcd)) == ["qwen-b load-1", "qwen load-1", "qwen old"]
    with pytest.raises(InvalidField):
        all_pulls(etcd, "qwen/0")


def test_all_pulls_are_known_as_they_come_change_and_go() -> None:
    a, b = a_pull(load_id="a"), a_pull(load_id="b")
    feed = Feed(ticket(a))
    with AllPulls(feed) as pulls:
        feed.give(ticket(b), KeyValue("/pulls/qwen/0/c", b"{", 1, 1, 1))
        feed.give(ticket(replace(b, nbytes=5)), Deletion(a.key, 3))
        feed.wait_until_taken(2)
        assert pulls.now() == (replace(b, nbytes=5),)
        feed.give(KeyValue(b.key, b"[", 1, 1, 1))
        feed.wait_until_taken(3)
        assert pulls.now() == ()
    assert not pulls._thread.is_alive()


def test_a_user_that_may_not_see_tickets_learns_so() -> None:
    class Refusing(Feed):
        def snapshot(self, prefix: str, exact: bool = False) -> Snapshot:
            raise EtcdRefused("no permission")

    with AllPulls(Refusing()) as pulls:
        wait_until(lambda: pulls.unseen is not None)
        assert (pulls.unseen, pulls.now()) == ("no permission", ())
