"""Pull tickets: issued while the record stands, also where etcd's first answer was lost; what they
say, and who sees it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from socket import gethostname
from types import SimpleNamespace
from typing import Any

import pytest

from engine_registry import Pull, RankRecord
from engine_registry.errors import EtcdFull, EtcdRefused, InvalidField
from engine_registry.pulls.follow import AllPulls
from engine_registry.pulls.queries import all_pulls, count_pulls, readers_of
from engine_registry.pulls.taking import Pulling, take_ticket
from engine_registry.pulls.ticket import PullTicket, _keep
from engine_registry.schema.keyvalue import Deletion, KeyValue, Outcome, Put, Snapshot
from engine_registry.schema.pull_ticket import Reader
from engine_registry.schema.pull_ticket import encode as encode_pull
from engine_registry.schema.record_format import decode, encode
from tests.support.builders import OTHER_INCARNATION, a_pull, a_record, ticket
from tests.support.fake_etcd import FakeEtcd
from tests.support.feed import Feed
from tests.support.shelf import shelve
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


# -- several at once
# --------------------------------------------------------------------------------------------------


class Counting(FakeEtcd):
    """Counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def grant(self, ttl_s: float) -> int:
        self.asked.append("grant")
        return super().grant(ttl_s)

    def revoke(self, lease_id: int) -> None:
        self.asked.append("revoke")
        super().revoke(lease_id)

    def decide(self, *given: Any, **reads: Any) -> Outcome:
        self.asked.append("decide")
        return super().decide(*given, **reads)


@pytest.fixture
def counting() -> Counting:
    return Counting()


def some_ranks(etcd: FakeEtcd, count: int) -> list[RankRecord]:
    return [
        shelve(etcd, a_record(instance=f"i{number}", incarnation=f"{number:032}"))
        for number in range(count)
    ]


@pytest.mark.parametrize("answer_lost", [False, True])
@pytest.mark.parametrize("free", [False, True])
def test_tickets_for_several_ranks_take_one_lease_and_one_transaction_which_reads_their_records(
    counting: Counting, answer_lost: bool, free: bool
) -> None:
    ranks = some_ranks(counting, 4)
    pulling, since = Pulling(counting), counting.read([])[0] if free else None
    counting.retry_next_commit = answer_lost
    taken = pulling.take(ranks, free_since=since)
    assert taken.ticket is not None
    with taken.ticket:
        assert taken.records == tuple(ranks)
        assert count_pulls(counting, ranks) == {record.incarnation: 1 for record in ranks}
        if not (answer_lost and free):  # else the answer had the records
            assert taken.snapshot is not None
            assert [item.key for item in taken.snapshot.items] == [one.key for one in ranks]
    pulling.close()
    assert counting.asked == ["grant", "decide", "revoke"]
    assert all_pulls(counting) == ()


def test_a_refused_ticket_keeps_none_of_the_others_back_and_it_is_said_why(
    counting: Counting,
) -> None:
    ranks = some_ranks(counting, 4)
    since, _ = counting.read([])
    other = take_ticket(counting, ranks[1])
    shelve(counting, replace(ranks[2], version=9))
    counting.asked.clear()
    with closing(Pulling(counting)) as pulling:
        taken = pulling.take(ranks, free_since=since, among=ranks[:2])
        assert taken.records == (ranks[0], ranks[3])
        assert taken.faster == {ranks[1].incarnation}
        assert taken.readers == {ranks[0].incarnation: 0, ranks[1].incarnation: 1}
        assert counting.asked == ["grant", "decide", "decide"]
        for ticket in (taken.ticket, other):
            assert ticket is not None
            ticket.close()


def test_a_refusal_says_how_many_read_from_each_so_that_the_next_try_is_one_request(
    counting: Counting,
) -> None:
    first, second, third = ranks = some_ranks(counting, 3)
    since, _ = counting.read([])
    others = [take_ticket(counting, first), take_ticket(counting, first)]
    counting.asked.clear()
    with closing(Pulling(counting)) as pulling:
        taken = pulling.take([first], free_since=since, among=ranks)
        assert (taken.ticket, taken.records) == (None, ())
        assert taken.faster == {first.incarnation}
        assert taken.readers == {one.incarnation: 2 * (one is first) for one in ranks}
        again = pulling.take([second], free_since=taken.revision, among=ranks)
        assert again.records == (second,)
        assert counting.asked == ["grant", "decide", "decide"]
        shelve(counting, replace(third, version=9))  # the others must be looked for anew
        late = pulling.take([first], free_since=since, among=ranks)
        assert late.faster == {first.incarnation}
        assert late.readers is None
        for ticket in (again.ticket, *others):
            assert ticket is not None
            ticket.close()
    assert not counting.leases


def test_a_lease_that_expired_before_the_next_try_is_replaced(counting: Counting) -> None:
    first, second = some_ranks(counting, 2)
    since, _ = counting.read([])
    with take_ticket(counting, first) or closing(counting), closing(Pulling(counting)) as pulling:
        assert pulling.take([first], free_since=since).ticket is None
        counting.expire(pulling._lease_id)
        ticket = pulling.take([second]).ticket
        assert ticket is not None
        ticket.close()


def test_many_tickets_are_taken_some_at_a_time_and_all_of_them_report(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_registry.pulls.ticket._REPORT_S", 0.001)
    ranks = some_ranks(counting, 100)
    shelve(counting, replace(ranks[40], version=9))
    with closing(Pulling(counting)) as pulling:
        taken = pulling.take(ranks)
        assert taken.ticket is not None
        assert len(taken.records) == 99
        assert counting.asked == ["grant", *["decide"] * 5]
        assert taken.snapshot is None
        with taken.ticket as ticket:
            gone = next(pull for pull in all_pulls(counting))
            counting.delete(gone.key)
            ticket.report(5, 10)
            wait_until(lambda: set(progress_in(counting)) == {(5, 10)})
            assert len(progress_in(counting)) == 98  # one that was deleted stays away
    assert not counting.leases


def test_where_etcd_refuses_some_of_many_none_is_left(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = some_ranks(counting, 40)
    decide = counting.decide

    def refuse_the_second(*given: Any, **reads: Any) -> Outcome:
        if counting.asked.count("decide"):
            raise EtcdFull("etcd has no space")
        return decide(*given, **reads)

    monkeypatch.setattr(counting, "decide", refuse_the_second)
    with pytest.raises(EtcdFull):
        Pulling(counting).take(ranks)
    assert not counting.leases
    assert all_pulls(counting) == ()


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


def test_progress_is_written_in_ten_steps_at_most_and_every_five_seconds_at_most(
    etcd: FakeEtcd, read: RankRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float | None] = []

    class Clock(threading.Event):
        """Each wait takes its time, until there have been a thousand."""

        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            assert held_one is not None
            held_one.report(len(waits), 1_000)
            return len(waits) == 1_001

    held_one = take_ticket(etcd, read)
    assert held_one is not None
    with held_one:
        writes = len(etcd.history)
        clock = SimpleNamespace(monotonic=lambda: sum(wait or 0 for wait in waits))
        monkeypatch.setattr("engine_registry.pulls.ticket.time", clock)
        _keep(weakref.ref(held_one), Clock())
        assert set(waits) == {5.0}
        assert progress_in(etcd) == [(1_000, 1_000)]
        assert len(etcd.history) - writes == 11  # the first one says how much there is


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
    wait_until(lambda: not held._written or not held._thread.is_alive())
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
    wait_until(lambda: not held._written)
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
