"""The keeper: it holds a registration through expiry and outage, and never against somebody who
ended it on purpose.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from engine_registry import RankJoined, RankLost, RankRecord, RankState
from engine_registry.errors import (
    EtcdUnavailable,
    Evicted,
    InstanceMismatch,
    RankConflict,
    RegistryError,
    Superseded,
)
from engine_registry.registration.eviction import evict
from engine_registry.registration.keeper import holder, main
from engine_registry.registration.keeper.holder import Keeper
from engine_registry.registration.keeper.main import record_from_wire, reporter, serve
from engine_registry.registration.keeper.protocol import Frame, read_frame
from engine_registry.schema.eviction import Eviction
from engine_registry.schema.keys import MANIFESTS, evicted_key
from engine_registry.schema.keyvalue import Deletion, Put
from engine_registry.schema.record_format import decode, encode
from engine_registry.watching.tracker import Tracker
from tests.support.builders import OTHER_INCARNATION, a_record
from tests.support.fake_etcd import FakeEtcd, FakeKeyWatch

TTL_S = 9.0
LIMIT_S = 30.0  # after so long without an answer a rank is unresponsive
PARTS = [b"part 0", b"part 1"]
OURS = a_record()
RIVAL = a_record(incarnation=OTHER_INCARNATION)
NEWER = replace(OURS, version=4, state=RankState.UPDATING)
MOVED = replace(OURS, incarnation="d" * 32, version=4, header_addr=8192)
MOVED_PARTS = [b"other 0", b"other 1", b"other 2"]
SUSPENDED, REGISTERED = "SUSPENDED", "REGISTERED"


class Rank:
    """What the rank's end of the pipe has received."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []

    def report(self, message: dict[str, Any]) -> None:
        self.received.append(message)

    @property
    def states(self) -> list[str]:
        """As they changed: every beat has one."""
        states = [message["state"] for message in self.received if "state" in message]
        return [
            state
            for before, state in zip([REGISTERED, *states], states, strict=False)
            if state != before
        ]


@pytest.fixture(params=[False, True], ids=["watched", "not watched"])
def etcd(request: pytest.FixtureRequest) -> FakeEtcd:
    """Where no watch is to be had, a keeper looks at the key at every beat."""
    etcd = FakeEtcd()
    etcd.refuse_to_watch = request.param
    return etcd


@pytest.fixture
def rank() -> Rank:
    return Rank()


def a_keeper(etcd: FakeEtcd, rank: Rank, record: RankRecord = OURS) -> Keeper:
    return Keeper(etcd, record, PARTS, TTL_S, rank.report, FakeKeyWatch(etcd, record.key))


def a_successor(etcd: FakeEtcd, rank: Rank) -> Keeper:
    """For a rank that has offered other memory."""
    watch = FakeKeyWatch(etcd, MOVED.key)
    return Keeper(etcd, MOVED, MOVED_PARTS, TTL_S, rank.report, watch, [OURS.incarnation])


@pytest.fixture
def holding(etcd: FakeEtcd, rank: Rank, clock: Clock) -> Keeper:
    """A keeper that has registered OURS."""
    keeper = a_keeper(etcd, rank)
    keeper.register()
    return keeper


def parts_in(etcd: FakeEtcd) -> list[bytes]:
    """Of all manifests."""
    return [etcd.value(key) for key in etcd.keys if key.startswith(MANIFESTS)]


def found(etcd: FakeEtcd) -> RankRecord | None:
    item = etcd.get(OURS.key)
    return decode(item.key, item.value, item.mod_revision) if item else None


def registered(etcd: FakeEtcd, record: RankRecord) -> Keeper:
    """Another rank's keeper, which has registered its record."""
    other = a_keeper(etcd, Rank(), record)
    other.register()
    return other


# -- registering
# --------------------------------------------------------------------------------------------------


def test_a_registration_lies_under_one_lease_of_the_time_that_was_asked_for(
    etcd: FakeEtcd, holding: Keeper
) -> None:
    assert found(etcd) == OURS
    assert list(etcd.leases.values()) == [TTL_S]
    etcd.expire_all()
    assert etcd.keys == []


@pytest.mark.parametrize(
    ("there", "error"),
    [(RIVAL, RankConflict), (replace(RIVAL, rank=1, generation="launch-0"), InstanceMismatch)],
    ids=["conflict", "mismatch"],
)
def test_a_registration_that_is_refused_leaves_nothing_behind(
    etcd: FakeEtcd, rank: Rank, there: RankRecord, error: type[RegistryError]
) -> None:
    registered(etcd, there)
    keys, leases = etcd.keys, etcd.leases
    with pytest.raises(error):
        a_keeper(etcd, rank).register()
    assert (etcd.keys, etcd.leases) == (keys, leases)
    assert rank.received == []


def test_a_registration_whose_answer_is_lost_is_an_error_and_leaves_nothing_behind(
    etcd: FakeEtcd, rank: Rank
) -> None:
    etcd.lose_next_answer = True
    with pytest.raises(EtcdUnavailable):
        a_keeper(etcd, rank).register()
    assert (etcd.keys, etcd.leases) == ([], {})


def test_a_registration_without_etcd_is_an_error(etcd: FakeEtcd, rank: Rank) -> None:
    etcd.available = False
    with pytest.raises(EtcdUnavailable):
        a_keeper(etcd, rank).register()


# -- holding
# --------------------------------------------------------------------------------------------------


def test_a_beat_renews_the_lease_and_the_next_is_due_in_a_third_of_its_time(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    before = list(etcd.history)
    assert holding.beat() == TTL_S / 3
    assert etcd.renewed == list(etcd.leases)
    assert etcd.history == before
    (message,) = rank.received
    assert (message["state"], message["why"], message["claims_again"]) == (REGISTERED, "", 0)
    assert message["renewed_in_s"] >= 0


def test_a_beat_says_how_often_the_record_was_put_again_and_no_time_where_nothing_was_renewed(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    etcd.expire_all()
    holding.beat()
    holding.beat()
    etcd.expire_all()
    holding.beat()
    assert [message["claims_again"] for message in rank.received] == [1, 1, 2]
    assert [message["renewed_in_s"] is None for message in rank.received] == [True, False, True]


def test_a_lease_that_was_lost_is_replaced_and_the_same_record_put_again(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    (first,) = etcd.leases
    etcd.expire_all()
    assert holding.beat() == TTL_S / 3
    assert found(etcd) == OURS
    (second,) = etcd.leases
    assert second != first
    holding.beat()
    assert etcd.renewed == [second]
    assert rank.states == []


def test_an_outage_is_reported_once_when_it_begins_and_once_when_it_ends(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    etcd.available = False
    waits_s = [holding.beat() for _ in range(20)]
    assert (rank.states, holding.suspended) == ([SUSPENDED], True)
    assert "etcd is away" in rank.received[0]["why"]
    assert max(waits_s) <= 0.6 < TTL_S / 3  # capped, so that a return is noticed soon
    etcd.available = True
    assert [holding.beat() for _ in range(3)] == [TTL_S / 3] * 3
    assert (rank.states, holding.suspended) == ([SUSPENDED, REGISTERED], False)
    assert found(etcd) == OURS


def test_every_beat_has_the_state_and_shows_the_rank_that_its_keeper_lives(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    for available in (True, True, False, False, True):
        etcd.available = available
        holding.beat()
    assert [message["state"] for message in rank.received] == [
        REGISTERED,
        REGISTERED,
        SUSPENDED,
        SUSPENDED,
        REGISTERED,
    ]


def test_a_keeper_that_takes_over_says_that_the_rank_is_registered_though_it_was_never_suspended(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    a_keeper(etcd, rank).beat()
    (message,) = rank.received
    assert (message["state"], message["why"], message["claims_again"]) == (REGISTERED, "", 1)


def test_a_lease_of_a_day_is_still_looked_at_often_enough_to_notice_a_keeper_that_hangs(
    etcd: FakeEtcd, rank: Rank
) -> None:
    watch = FakeKeyWatch(etcd, OURS.key)
    keeper = Keeper(etcd, OURS, PARTS, 86_400.0, rank.report, watch)
    keeper.register()
    assert keeper.beat() == 20.0


def test_a_second_outage_is_reported_as_well(etcd: FakeEtcd, rank: Rank, holding: Keeper) -> None:
    for available in (False, True, False, True):
        etcd.available = available
        holding.beat()
    assert rank.states == [SUSPENDED, REGISTERED] * 2


def test_a_lease_that_expires_during_an_outage_is_replaced_after_it(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    etcd.available = False
    holding.beat()
    etcd.expire_all()
    etcd.available = True
    holding.beat()
    assert found(etcd) == OURS
    assert len(etcd.leases) == 1
    assert rank.states == [SUSPENDED, REGISTERED]


def test_a_keeper_that_takes_over_registers_with_its_first_beat(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    successor = a_keeper(etcd, rank)
    (first,) = etcd.leases
    successor.beat()
    etcd.expire(first)
    successor.beat()
    assert found(etcd) == OURS
    assert rank.states == []


# -- watching the key
# --------------------------------------------------------------------------------------------------


def beats_for(keeper: Keeper, clock: Clock, seconds: float) -> None:
    end = clock.now + seconds
    while clock.now < end:
        clock.now += keeper.beat()


def test_a_key_that_is_watched_is_looked_at_with_the_first_beat_and_once_a_minute(
    etcd: FakeEtcd, holding: Keeper, clock: Clock
) -> None:
    beats_for(holding, clock, 10 * holder.LOOK_EVERY_S)
    beats = len(etcd.renewed)
    assert beats == 10 * holder.LOOK_EVERY_S / (TTL_S / 3)
    assert etcd.looks == (beats if etcd.refuse_to_watch else 10)


def test_a_key_is_looked_at_and_watched_again_after_the_watch_has_broken(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    etcd.refuse_to_watch = False
    for _ in range(2):
        holding.beat()
        before = etcd.looks
        holding.beat()
        assert etcd.looks == before
        etcd.available = False
        holding.beat()
        etcd.available = True
    holding.beat()
    assert etcd.looks == before + 1
    assert holding.is_quiet()


def test_a_key_is_looked_at_after_a_beat_that_has_failed_though_its_watch_stands(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    etcd.refuse_to_watch = False
    holding.beat()
    etcd.full = True
    holding.change(NEWER)
    holding.beat()
    assert rank.states == [SUSPENDED]
    assert holding.is_quiet()
    before = etcd.looks
    etcd.full = False
    holding.beat()
    assert etcd.looks == before + 1
    assert found(etcd) == NEWER


def test_what_a_member_that_is_far_behind_does_not_tell_is_found_within_a_minute(
    etcd: FakeEtcd, rank: Rank, clock: Clock
) -> None:
    watch = FakeKeyWatch(etcd, OURS.key)
    watch.hears = False
    keeper = Keeper(etcd, OURS, PARTS, TTL_S, rank.report, watch)
    keeper.register()
    keeper.beat()
    ending_by_eviction(etcd)
    with pytest.raises(Evicted):
        beats_for(keeper, clock, holder.LOOK_EVERY_S + TTL_S)


def test_a_change_that_was_written_but_tried_again_is_looked_at_though_the_watch_is_late(
    etcd: FakeEtcd, rank: Rank, clock: Clock
) -> None:
    watch = FakeKeyWatch(etcd, OURS.key)
    watch.hears = False
    keeper = Keeper(etcd, OURS, PARTS, TTL_S, rank.report, watch)
    keeper.register()
    keeper.beat()
    etcd.retry_next_commit = True
    keeper.change(NEWER)
    keeper.beat()
    assert found(etcd) == NEWER
    assert rank.states == []


def test_what_the_keeper_writes_itself_is_no_change_of_the_key(
    etcd: FakeEtcd, holding: Keeper
) -> None:
    etcd.refuse_to_watch = False
    holding.beat()
    holding.change(NEWER)
    holding.beat()
    holding.change(MOVED, MOVED_PARTS)
    holding.beat()
    assert holding.is_quiet()
    etcd.expire_all()
    assert not holding.is_quiet()
    holding.beat()
    assert holding.is_quiet()


# -- offering other memory
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [MOVED_PARTS, MOVED_PARTS[:1]])
def test_other_memory_takes_the_place_of_the_former_in_record_and_manifest_at_once(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, parts: list[bytes]
) -> None:
    (lease_id,) = etcd.leases
    holding.change(MOVED, parts)
    holding.beat()
    assert found(etcd) == MOVED
    assert sorted(parts_in(etcd)) == sorted(parts)
    assert {etcd.lease_of(key) for key in etcd.keys} == {lease_id}
    before = list(etcd.history)
    holding.change(replace(MOVED, version=9))
    holding.beat()
    assert found(etcd) == replace(MOVED, version=9)
    assert len(etcd.history) == len(before) + 3  # the record, its entry and the former entry
    assert rank.states == []


@pytest.mark.parametrize("expired", [False, True])
def test_memory_that_changed_several_times_in_an_outage_is_offered_after_it(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, expired: bool
) -> None:
    etcd.available = False
    holding.change(replace(MOVED, incarnation="e" * 32), [b"never written"])
    holding.beat()
    holding.change(MOVED, MOVED_PARTS)
    holding.beat()
    if expired:
        etcd.expire_all()
    etcd.available = True
    holding.beat()
    assert found(etcd) == MOVED
    assert sorted(parts_in(etcd)) == sorted(MOVED_PARTS)
    assert rank.states == [SUSPENDED, REGISTERED]


def test_other_memory_whose_answer_was_lost_is_recognised_as_our_own(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    etcd.lose_next_answer = True
    holding.change(MOVED, MOVED_PARTS)
    for _ in range(3):
        holding.beat()
    assert found(etcd) == MOVED
    assert sorted(parts_in(etcd)) == sorted(MOVED_PARTS)
    assert rank.states[-1:] != ["LOST"]


@pytest.mark.parametrize("expired", [False, True])
def test_a_rank_that_was_evicted_does_not_come_back_with_other_memory(
    etcd: FakeEtcd, holding: Keeper, expired: bool
) -> None:
    record = found(etcd)
    assert record is not None
    (lease_id,) = etcd.leases
    assert evict(etcd, record)
    if expired:
        etcd.expire(lease_id)
    holding.change(MOVED, MOVED_PARTS)
    with pytest.raises(Evicted):
        holding.beat()
    assert found(etcd) is None


def test_a_restored_backup_of_before_other_memory_is_written_over(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    holding.change(MOVED, MOVED_PARTS)
    holding.beat()
    etcd.restore([Put(OURS.key, encode(OURS), etcd.grant(TTL_S))], back_to_revision=1)
    holding.beat()
    assert found(etcd) == MOVED
    assert set(MOVED_PARTS) <= set(parts_in(etcd))
    assert rank.states == []


@pytest.mark.parametrize("written", [False, True])
def test_the_next_keeper_offers_other_memory_whether_the_one_before_had_written_it_or_not(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, written: bool
) -> None:
    holding.change(MOVED, MOVED_PARTS)
    if written:
        holding.beat()
    successor = a_successor(etcd, rank)
    successor.beat()
    assert found(etcd) == MOVED
    assert set(MOVED_PARTS) <= set(parts_in(etcd))


def test_a_rank_that_ends_while_other_memory_is_not_offered_yet_leaves_nothing(
    etcd: FakeEtcd, rank: Rank
) -> None:
    a_keeper(etcd, rank).register()
    successor = a_successor(etcd, rank)
    successor.end("withdrawn")
    assert found(etcd) is None
    assert parts_in(etcd) == []


# -- changing
# --------------------------------------------------------------------------------------------------


def test_a_changed_record_is_written_by_the_next_beat_and_only_once(
    etcd: FakeEtcd, holding: Keeper
) -> None:
    holding.change(NEWER)
    holding.beat()
    assert found(etcd) == NEWER
    before = list(etcd.history)
    holding.beat()
    assert etcd.history == before


@pytest.mark.parametrize("expired", [False, True])
def test_a_change_during_an_outage_is_written_after_it(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, expired: bool
) -> None:
    etcd.available = False
    holding.change(replace(OURS, version=3))
    holding.beat()
    holding.change(NEWER)
    holding.beat()
    if expired:
        etcd.expire_all()
    etcd.available = True
    assert found(etcd) == (None if expired else OURS)
    before = len(etcd.history)
    holding.beat()
    assert found(etcd) == NEWER
    assert [change.key for change in etcd.history[before:]].count(OURS.key) == 1
    assert rank.states == [SUSPENDED, REGISTERED]


def test_a_change_whose_answer_was_lost_is_recognised_as_our_own(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    etcd.lose_next_answer = True
    holding.change(NEWER)
    holding.beat()
    assert rank.states == [SUSPENDED]
    holding.beat()
    assert found(etcd) == NEWER
    assert rank.states == [SUSPENDED, REGISTERED]


@pytest.mark.parametrize("at_the_same_revision", [False, True])
def test_something_old_of_ours_is_written_over_with_manifest_and_lease_as_after_a_restored_backup(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, at_the_same_revision: bool
) -> None:
    (lease_id,) = etcd.leases
    holding.change(NEWER)
    holding.beat()
    etcd.restore(
        [Put(OURS.key, encode(OURS), etcd.grant(TTL_S))],
        back_to_revision=3 if at_the_same_revision else 1,
    )
    holding.beat()
    assert found(etcd) == NEWER
    assert {etcd.lease_of(key) for key in etcd.keys} == {lease_id}
    assert [value for value in map(etcd.value, etcd.keys) if value in PARTS] == PARTS
    before = list(etcd.history)
    holding.beat()
    assert etcd.history == before
    assert rank.states == []


def test_a_change_that_was_written_but_tried_again_is_recognised_as_our_own(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    etcd.retry_next_commit = True
    before = len(etcd.history)
    holding.change(NEWER)
    holding.beat()
    assert found(etcd) == NEWER
    assert len(etcd.history) == before + 3  # the record, its entry and the former entry
    assert rank.states == []


def test_a_lease_lost_between_renewing_and_writing_is_mended_by_the_beat_after(
    etcd: FakeEtcd, holding: Keeper
) -> None:
    etcd.before_commit = etcd.expire_all
    holding.change(NEWER)
    holding.beat()
    holding.beat()
    assert found(etcd) == NEWER


# -- losing
# --------------------------------------------------------------------------------------------------


def ending_by_eviction(etcd: FakeEtcd) -> None:
    record = found(etcd)
    assert record is not None
    assert evict(etcd, record)


def ending_by_a_deleted_key(etcd: FakeEtcd) -> None:
    etcd.delete(OURS.key)


def ending_by_a_mark(etcd: FakeEtcd) -> None:
    """The first half of an eviction whose second half never came."""
    etcd.put(OURS.key, encode(replace(OURS, ended="evicted")))


@pytest.mark.parametrize("ending", [ending_by_eviction, ending_by_a_deleted_key, ending_by_a_mark])
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("away", [False, True])
def test_a_registration_ended_by_somebody_is_evicted_and_never_put_back(
    etcd: FakeEtcd, holding: Keeper, ending: Callable[[FakeEtcd], None], changed: bool, away: bool
) -> None:
    if away:
        etcd.available = False
        holding.beat()
        etcd.available = True
    (lease_id,) = etcd.leases
    ending(etcd)
    if changed:
        holding.change(NEWER)
    with pytest.raises(Evicted, match=OURS.key):
        holding.beat()
    now = found(etcd)
    assert now is None or now.ended
    assert lease_id not in etcd.leases


@pytest.mark.parametrize("expired", [False, True], ids=["lease lives", "lease expired"])
def test_the_rank_learns_who_has_evicted_it_and_why(
    etcd: FakeEtcd, holding: Keeper, expired: bool
) -> None:
    record = found(etcd)
    assert record is not None
    (lease_id,) = etcd.leases
    assert evict(etcd, record, Eviction("alice@node-9", "2026-01-02T03:06:00+00:00", "bad bytes"))
    if expired:
        etcd.expire(lease_id)
    with pytest.raises(Evicted, match=r"by alice@node-9 at 2026-01-02T03:06:00\+00:00: bad bytes"):
        holding.beat()


def test_an_eviction_during_an_outage_that_outlasts_the_lease_is_still_found(
    etcd: FakeEtcd, rank: Rank, holding: Keeper
) -> None:
    etcd.available = False
    holding.beat()
    etcd.available = True
    (lease_id,) = etcd.leases
    ending_by_eviction(etcd)
    etcd.expire(lease_id)
    with pytest.raises(Evicted):
        holding.beat()
    assert etcd.keys == [evicted_key("qwen", 0, OURS.incarnation)]
    assert len(etcd.leases) == 1  # the mark's
    assert rank.states == [SUSPENDED]


def test_an_eviction_between_renewing_and_writing_is_noticed(
    etcd: FakeEtcd, holding: Keeper
) -> None:
    etcd.before_commit = lambda: ending_by_eviction(etcd)
    holding.change(NEWER)
    with pytest.raises(Evicted):
        holding.beat()
    assert found(etcd) is None


def test_a_rank_that_another_process_has_taken_meanwhile_is_superseded_and_left_alone(
    etcd: FakeEtcd, holding: Keeper
) -> None:
    etcd.expire_all()
    registered(etcd, RIVAL)
    leases = etcd.leases
    with pytest.raises(Superseded, match="already registered"):
        holding.beat()
    assert found(etcd) == RIVAL
    assert etcd.leases == leases


@pytest.mark.parametrize("value", [encode(RIVAL), b"junk"], ids=["another process", "junk"])
def test_a_key_that_was_overwritten_is_superseded_and_left_alone(
    etcd: FakeEtcd, holding: Keeper, value: bytes
) -> None:
    etcd.put(OURS.key, value)
    with pytest.raises(Superseded):
        holding.beat()
    assert etcd.value(OURS.key) == value
    assert etcd.leases == {}


def test_siblings_of_a_new_launch_supersede_a_rank_that_comes_back(
    etcd: FakeEtcd, holding: Keeper
) -> None:
    etcd.expire_all()
    sibling = replace(RIVAL, rank=1, generation="launch-2")
    registered(etcd, sibling)
    with pytest.raises(Superseded, match="generation"):
        holding.beat()
    assert found(etcd) is None


# -- ending
# --------------------------------------------------------------------------------------------------


def test_an_end_is_marked_before_the_keys_go_so_that_watchers_know_why(
    etcd: FakeEtcd, holding: Keeper
) -> None:
    tracker = Tracker()
    tracker.snapshot(etcd.snapshot("/engines/"), 0.0)
    before = len(etcd.history)
    holding.end("withdrawn")
    assert (etcd.keys, etcd.leases) == ([], {})
    marked, *rest = etcd.history[before:]
    assert RankLost(OURS, "withdrawn") in tracker.changes((marked,), 0.0)
    assert {type(change) for change in rest} == {Deletion}
    assert tracker.changes(tuple(rest), 0.0) == []


def test_an_end_comes_only_once(etcd: FakeEtcd, holding: Keeper) -> None:
    holding.end("withdrawn")
    registered(etcd, RIVAL)
    holding.end("withdrawn")
    assert found(etcd) == RIVAL


def test_an_end_that_did_not_reach_etcd_can_be_tried_again(etcd: FakeEtcd, holding: Keeper) -> None:
    etcd.available = False
    with pytest.raises(EtcdUnavailable):
        holding.end("withdrawn")
    etcd.available = True
    holding.end("withdrawn")
    assert (etcd.keys, etcd.leases) == ([], {})


@pytest.mark.parametrize("lost", ["answer", "lease"])
def test_an_end_that_was_half_done_is_finished(etcd: FakeEtcd, holding: Keeper, lost: str) -> None:
    if lost == "answer":
        etcd.lose_next_answer = True
        with pytest.raises(EtcdUnavailable):
            holding.end("withdrawn")
    else:
        etcd.before_commit = etcd.expire_all
    holding.end("withdrawn")
    assert (etcd.keys, etcd.leases) == ([], {})


@pytest.mark.parametrize("known", [True, False], ids=["lease known", "lease of a keeper before"])
def test_an_etcd_without_space_loses_the_rank_all_the_same(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, known: bool
) -> None:
    etcd.full = True
    (holding if known else a_keeper(etcd, rank)).end("process ended")
    assert etcd.keys == []


@pytest.mark.parametrize("known", [True, False], ids=["lease known", "lease of a keeper before"])
def test_an_end_that_was_marked_but_tried_again_is_finished(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, known: bool
) -> None:
    etcd.retry_next_commit = True
    (holding if known else a_keeper(etcd, rank)).end("withdrawn")
    assert etcd.keys == []


def test_the_end_of_a_registration_whose_key_another_has_taken_leaves_that_one_alone(
    etcd: FakeEtcd, holding: Keeper
) -> None:
    etcd.expire_all()
    registered(etcd, RIVAL)
    holding.end("withdrawn")
    assert found(etcd) == RIVAL


def test_a_whole_life_is_seen_by_a_watcher_as_one_join_and_one_loss(
    etcd: FakeEtcd, rank: Rank
) -> None:
    keeper = a_keeper(etcd, rank)
    keeper.register()
    keeper.beat()
    etcd.expire_all()
    keeper.beat()
    keeper.end("process ended")
    events = Tracker().changes(tuple(etcd.history), 0.0)
    assert [event for event in events if isinstance(event, RankJoined | RankLost)] == [
        RankJoined(OURS),
        RankLost(OURS, "process ended"),
    ]


# -- serving the rank
# --------------------------------------------------------------------------------------------------


class Inbox(queue.Queue[Frame | None]):
    """What the rank sends; SILENCE stands for as much time as the keeper is ready to wait."""

    SILENCE = Frame({"op": "silence"})

    def __init__(self, clock: Clock, *frames: Frame | None) -> None:
        super().__init__()
        self._clock = clock
        self._frames = list(frames)

    def get(self, block: bool = True, timeout: float | None = None) -> Frame | None:
        frame = self._frames.pop(0)
        if frame is not self.SILENCE:
            return frame
        assert timeout is not None
        self._clock.now += timeout
        raise queue.Empty

    @property
    def unread(self) -> int:
        return len(self._frames)


SILENCE = Inbox.SILENCE
CHANGED = Frame({"op": "changed"})


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.at: Callable[[], None] = lambda: None  # what happens whenever somebody sleeps

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.at()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    time = SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep, time=clock.monotonic)
    for module in (main, holder):
        monkeypatch.setattr(module, "time", time)
    return clock


def update(record: RankRecord, seq: int = 1) -> Frame:
    return Frame({"op": "update", "key": record.key, "seq": seq}, (encode(record),))


def end(seq: int = 2) -> Frame:
    return Frame({"op": "end", "reason": "withdrawn", "seq": seq})


def test_a_silent_rank_is_kept_by_beats_at_a_third_of_the_lease(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock
) -> None:
    start = clock.now
    serve(holding, Inbox(clock, *[Inbox.SILENCE] * 4, None), rank.report, LIMIT_S)
    assert len(etcd.renewed) == 4
    assert clock.now == start + 4 * TTL_S / 3


def test_a_lease_whose_claim_has_taken_long_is_renewed_at_once(
    etcd: FakeEtcd, rank: Rank, clock: Clock
) -> None:
    def slow() -> None:
        clock.now += TTL_S - 1

    etcd.before_commit = slow
    keeper = a_keeper(etcd, rank)
    keeper.register()
    assert keeper.due_s == 0.0
    assert a_keeper(etcd, rank).due_s == 0.0  # one that takes over has to claim


@pytest.mark.parametrize("later", [[CHANGED], [SILENCE, CHANGED]], ids=["first", "after a beat"])
def test_an_eviction_that_the_watch_tells_is_found_before_the_next_beat_is_due(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock, later: list[Frame]
) -> None:
    etcd.refuse_to_watch = False
    holding.beat()
    heard: list[float] = []

    class Evicts(Inbox):
        def get(self, block: bool = True, timeout: float | None = None) -> Frame | None:
            frame = super().get(block, timeout)
            if frame is CHANGED:
                ending_by_eviction(etcd)
                heard.append(clock.now)
            return frame

    serve(holding, Evicts(clock, *later, SILENCE), rank.report, LIMIT_S)
    assert rank.states == ["LOST"]
    assert clock.now - heard[0] < 1.0 < TTL_S / 3


def test_a_change_of_the_keepers_own_brings_no_beat_forward(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock
) -> None:
    etcd.refuse_to_watch = False
    holding.beat()
    looks = Looks(etcd, clock, update(NEWER), CHANGED, SILENCE)
    with pytest.raises(Enough):
        serve(holding, looks, rank.report, LIMIT_S)
    assert looks.waits_s[1:] == [TTL_S / 3] * 3


def test_a_change_of_the_key_is_no_answer_of_the_rank(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock
) -> None:
    etcd.refuse_to_watch = False
    holding.beat()
    looks = Looks(etcd, clock, *[SILENCE, CHANGED] * 20)
    with pytest.raises(Enough):
        serve(holding, looks, rank.report, LIMIT_S)
    assert looks.marks[-1]


@pytest.mark.parametrize(
    ("last", "reason", "replies"),
    [(end(), "withdrawn", [{"reply": 2, "error": None}]), (None, "process ended", [])],
)
def test_a_rank_that_withdraws_or_dies_is_deleted_with_the_reason(
    etcd: FakeEtcd,
    rank: Rank,
    holding: Keeper,
    clock: Clock,
    last: Frame | None,
    reason: str,
    replies: list[Any],
) -> None:
    serve(holding, Inbox(clock, last), rank.report, LIMIT_S)
    assert (etcd.keys, etcd.leases) == ([], {})
    values = [
        change.value
        for change in etcd.history
        if not isinstance(change, Deletion) and change.key == OURS.key
    ]
    assert decode(OURS.key, values[-1]).ended == reason
    assert rank.received == replies


def test_an_update_is_answered_after_it_is_written(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock
) -> None:
    versions: list[Any] = []

    def report(message: dict[str, Any]) -> None:
        now = found(etcd)
        versions.append((message.get("reply"), now and now.version))

    serve(holding, Inbox(clock, update(NEWER, seq=7), end()), report, LIMIT_S)
    assert versions[0] == (7, NEWER.version)


def test_an_update_during_an_outage_is_answered_without_asking_etcd_and_written_after_it(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock
) -> None:
    etcd.available = False
    refused_when_reported: list[int] = []

    def report(message: dict[str, Any]) -> None:
        rank.report(message)
        refused_when_reported.append(etcd.refused)

    class Back(Inbox):
        def get(self, block: bool = True, timeout: float | None = None) -> Frame | None:
            etcd.available = self.unread <= 2
            return super().get(block, timeout)

    serve(holding, Back(clock, Inbox.SILENCE, update(NEWER), Inbox.SILENCE, None), report, LIMIT_S)
    reply, back = rank.received[1:]
    assert (reply, back["state"], back["why"]) == (
        {"reply": 1, "written": False},
        REGISTERED,
        "",
    )
    assert rank.states == [SUSPENDED, REGISTERED]
    assert refused_when_reported == [1]  # by the beat before
    written = [
        change.value
        for change in etcd.history
        if not isinstance(change, Deletion) and change.key == OURS.key
    ]
    assert [decode(OURS.key, value).version for value in written] == [
        OURS.version,
        NEWER.version,
        NEWER.version,
    ]


@pytest.mark.parametrize("frames", [[Inbox.SILENCE], [update(NEWER)]], ids=["beat", "update"])
def test_a_registration_that_is_lost_is_reported_with_its_error_and_served_no_more(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock, frames: list[Frame]
) -> None:
    ending_by_eviction(etcd)
    inbox = Inbox(clock, *frames, Inbox.SILENCE)
    serve(holding, inbox, rank.report, LIMIT_S)
    assert inbox.unread == 1
    (message,) = rank.received
    assert (message["state"], message["error"]["type"]) == ("LOST", "Evicted")


def test_a_withdrawal_during_an_outage_is_answered_with_the_problem_and_tried_until_it_is_done(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock
) -> None:
    etcd.available = False
    start = clock.now

    def after_2_s() -> None:
        etcd.available = clock.now > start + 2

    clock.at = after_2_s
    serve(holding, Inbox(clock, end()), rank.report, LIMIT_S)
    (answer,) = rank.received
    assert (answer["reply"], answer["error"]["type"]) == (2, "EtcdUnavailable")
    assert (etcd.keys, etcd.leases) == ([], {})
    assert clock.now < start + 3


def test_a_withdrawal_during_an_outage_that_is_known_is_answered_without_asking_etcd(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock
) -> None:
    etcd.available = False
    holding.beat()
    refused_when_reported: list[int] = []
    serve(
        holding,
        Inbox(clock, end()),
        lambda message: refused_when_reported.append(etcd.refused),
        LIMIT_S,
    )
    assert refused_when_reported == [1]  # by the beat before
    assert etcd.refused > 1


def test_a_rank_that_dies_in_an_outage_is_deleted_after_it_though_a_restarted_etcd_renews_its_lease(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock
) -> None:
    etcd.available = False
    start = clock.now

    def after_an_outage() -> None:
        etcd.available = clock.now > start + 10 * TTL_S

    clock.at = after_an_outage
    serve(holding, Inbox(clock, None), rank.report, LIMIT_S)
    assert (etcd.keys, etcd.leases) == ([], {})


def test_an_end_that_does_not_reach_etcd_is_given_up_after_five_minutes(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock
) -> None:
    etcd.available = False
    start = clock.now
    serve(holding, Inbox(clock, None), rank.report, LIMIT_S)
    assert start + 300 < clock.now < start + 302
    assert rank.received == []


def test_what_a_rank_has_said_comes_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process may have ended before all of it is read."""
    monkeypatch.setattr(main, "_DRAIN_S", 60.0)
    inbox: queue.Queue[Frame | None] = queue.Queue()
    said, (ended, process) = threading.Event(), os.pipe()

    def read() -> None:
        said.wait(60)
        inbox.put(end())

    reader = threading.Thread(target=read)
    waits = threading.Thread(target=main._await_death, args=(ended, inbox, reader))
    reader.start()
    waits.start()
    os.close(process)
    said.set()
    waits.join(60)
    os.close(ended)
    assert [inbox.get(timeout=60), inbox.get(timeout=60)] == [end(), None]


def test_a_child_that_holds_the_pipe_open_does_not_hide_the_end_of_a_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(main, "_DRAIN_S", 0.01)
    inbox: queue.Queue[Frame | None] = queue.Queue()
    over, (ended, process) = threading.Event(), os.pipe()
    reader = threading.Thread(target=over.wait, args=(60,))
    reader.start()
    os.close(process)
    main._await_death(ended, inbox, reader)
    os.close(ended)
    assert inbox.get(timeout=60) is None
    over.set()
    reader.join(60)


# -- a rank that does not answer
# --------------------------------------------------------------------------------------------------

ANSWER = Frame({"op": "answer"})


class Enough(Exception):
    """The keeper has got all frames, and would go on."""


class Looks(Inbox):
    """Notes before each wait how the record stands in etcd, and for how long the keeper waits."""

    def __init__(self, etcd: FakeEtcd, clock: Clock, *frames: Frame | None) -> None:
        super().__init__(clock, *frames)
        self._etcd = etcd
        self.marks: list[str] = []
        self.waits_s: list[float] = []

    def get(self, block: bool = True, timeout: float | None = None) -> Frame | None:
        record = found(self._etcd) if self._etcd.available else None
        self.marks.append(record.unresponsive_since if record else "")
        assert timeout is not None
        self.waits_s.append(timeout)
        if not self.unread:
            raise Enough
        return super().get(block, timeout)


def test_a_rank_that_answers_each_beat_is_never_marked_and_costs_etcd_no_write(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock
) -> None:
    before = list(etcd.history)
    looks = Looks(etcd, clock, *[SILENCE, ANSWER] * 50)
    with pytest.raises(Enough):
        serve(holding, looks, rank.report, LIMIT_S)
    assert etcd.history == before
    assert clock.now > 1000 + LIMIT_S


@pytest.mark.parametrize("limit_s", [LIMIT_S, 2.0], ids=["many beats", "less than a beat"])
def test_a_rank_that_gives_no_answer_is_marked_when_the_limit_is_over_by_one_write(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock, limit_s: float
) -> None:
    before = len(etcd.history)
    looks = Looks(etcd, clock, *[SILENCE] * 20)
    with pytest.raises(Enough):
        serve(holding, looks, rank.report, limit_s)
    assert len(etcd.history) == before + 1
    marked = found(etcd)
    assert marked is not None
    assert replace(marked, unresponsive_since="") == OURS
    assert marked.unresponsive_since == "1970-01-01T00:16:43.000Z"  # when it was asked
    at = looks.marks.index(marked.unresponsive_since)
    assert sum(looks.waits_s[:at]) == TTL_S / 3 + limit_s
    assert rank.states == []  # its lease is renewed all the while


def test_a_rank_that_answers_again_is_unmarked_at_once(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock
) -> None:
    frames = [*[SILENCE] * 12, ANSWER, SILENCE, SILENCE]
    looks = Looks(etcd, clock, *frames)
    with pytest.raises(Enough):
        serve(holding, looks, rank.report, LIMIT_S)
    assert [bool(mark) for mark in looks.marks[-4:]] == [True, True, False, False]
    assert looks.waits_s[-3] == 0.0
    assert found(etcd) == OURS


def test_what_a_rank_changes_takes_the_mark_away(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock
) -> None:
    looks = Looks(etcd, clock, *[SILENCE] * 12, update(NEWER))
    with pytest.raises(Enough):
        serve(holding, looks, rank.report, LIMIT_S)
    assert looks.marks[-2]
    assert found(etcd) == NEWER


def test_a_keeper_that_was_stopped_itself_does_not_take_its_rank_for_silent(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock
) -> None:
    class Stopped(Looks):
        def get(self, block: bool = True, timeout: float | None = None) -> Frame | None:
            clock.now += 1000.0
            return super().get(block, timeout)

    looks = Stopped(etcd, clock, *[SILENCE, SILENCE, ANSWER] * 3)
    with pytest.raises(Enough):
        serve(holding, looks, rank.report, LIMIT_S)
    assert set(looks.marks) == {""}


def test_a_mark_that_etcd_did_not_take_is_written_after_the_outage(
    etcd: FakeEtcd, rank: Rank, holding: Keeper, clock: Clock
) -> None:
    class Back(Looks):
        def get(self, block: bool = True, timeout: float | None = None) -> Frame | None:
            etcd.available = self.unread <= 3
            return super().get(block, timeout)

    looks = Back(etcd, clock, *[SILENCE] * 200)
    with pytest.raises(Enough):
        serve(holding, looks, rank.report, LIMIT_S)
    now = found(etcd)
    assert now is not None
    assert now.unresponsive_since
    assert rank.states == [SUSPENDED, REGISTERED]


def test_a_record_of_four_kilobytes_can_still_be_marked(etcd: FakeEtcd, rank: Rank) -> None:
    full = replace(OURS, device="x" * (4096 - len(encode(replace(OURS, device="")))))
    keeper = a_keeper(etcd, rank, full)
    keeper.register()
    assert keeper.mark("2026-01-02T03:04:05.678+00:00")
    keeper.beat()
    marked = found(etcd)
    assert marked is not None
    assert marked.unresponsive_since
    assert marked.device == full.device


def test_a_rank_that_reads_nothing_does_not_stop_its_keeper_and_gets_whole_messages_later() -> None:
    read, write = os.pipe()
    report = reporter(write)
    for _ in range(5_000):
        report({"state": SUSPENDED, "why": "etcd is away"})
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        received = list(iter(lambda: read_frame(pipe), None))
    assert len(received) > 100
    assert {frame.message["why"] for frame in received} == {"etcd is away"}


def test_a_record_comes_over_the_pipe_as_it_is_stored() -> None:
    assert record_from_wire(update(NEWER)) == NEWER
