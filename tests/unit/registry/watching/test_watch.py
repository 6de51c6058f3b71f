"""From changes to events: what is a loss and what only a blip, that nothing is reported twice or
forgotten, and what that costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry import (
    Event,
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    InstanceState,
    InstanceStatus,
    RankJoined,
    RankLost,
    RankRecord,
    RankState,
    RankUpdated,
    VersionReleased,
)
from engine_registry.schema.keys import parse_record_key, record_key, release_key
from engine_registry.schema.keyvalue import Change, Deletion, KeyValue
from engine_registry.schema.record_format import decode
from engine_registry.schema.roster import Roster
from engine_registry.watching.tracker import EXPIRED, Tracker
from engine_registry.watching.watch import Watch
from tests.support.assessment import assess
from tests.support.builders import (
    INCARNATION,
    OTHER_INCARNATION,
    a_record,
    a_release,
    deleted,
    garbage,
    released,
    snapshot,
    stored,
)
from tests.support.feed import Feed
from tests.support.waiting import wait_until

A = a_record(rank=0)
B = a_record(rank=1)
ALONE = a_record(world_size=1)
LATER = "2026-01-02T04:00:00.000+00:00"
INSTANCE_EVENTS = (InstanceReady, InstanceDegraded, InstanceGone)


def kinds(events: list[Event]) -> list[type[Event]]:
    return [type(event) for event in events]


def of_ranks(events: list[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, INSTANCE_EVENTS)]


def of_instances(events: list[Event]) -> list[type[Event]]:
    return [type(event) for event in events if isinstance(event, INSTANCE_EVENTS)]


def following(*records: RankRecord) -> Tracker:
    """A tracker with a blip time of 1 s that has seen these at 0 s."""
    tracker = Tracker(blip_s=1.0)
    tracker.snapshot(snapshot(*map(stored, records)), 0.0)
    return tracker


def test_the_first_snapshot_yields_what_is_there() -> None:
    events = Tracker().snapshot(snapshot(stored(A), stored(B)), 0.0)
    assert events[:2] == [RankJoined(A), RankJoined(B)]
    assert kinds(events[2:]) == [InstanceReady]


def test_ranks_join_one_by_one_until_the_instance_is_ready() -> None:
    tracker = Tracker()
    first = tracker.changes((stored(A),), 0.0)
    assert first[0] == RankJoined(A)
    assert isinstance(first[1], InstanceDegraded)
    assert first[1].status.missing == (1,)
    second = tracker.changes((stored(B),), 1.0)
    assert second[0] == RankJoined(B)
    assert isinstance(second[1], InstanceReady)
    assert second[1].status.records == (A, B)


def test_a_changed_record_is_an_update_with_what_was_before() -> None:
    newer = a_record(version=4)
    assert following(A, B).changes((stored(newer, 2),), 1.0)[0] == RankUpdated(newer, A)


def test_a_record_that_is_put_again_unchanged_is_no_event() -> None:
    assert following(A, B).changes((stored(A, mod_revision=9),), 1.0) == []


def test_an_update_that_makes_the_ranks_differ_degrades_and_one_that_ends_it_makes_ready() -> None:
    tracker = following(A, B)
    busy = a_record(rank=0, state=RankState.UPDATING)
    assert kinds(tracker.changes((stored(busy),), 1.0)) == [RankUpdated, InstanceDegraded]
    assert kinds(tracker.changes((stored(a_record(version=4)),), 2.0)) == [RankUpdated]
    assert kinds(tracker.changes((stored(a_record(rank=1, version=4)),), 3.0)) == [
        RankUpdated,
        InstanceReady,
    ]


def test_a_deleted_record_is_lost_only_after_the_blip_time() -> None:
    tracker = following(A, B)
    assert tracker.changes((deleted(A),), 10.0) == []
    assert tracker.due == 11.0
    assert tracker.expire(10.999) == []
    events = tracker.expire(11.0)
    assert events[0] == RankLost(A, EXPIRED)
    assert kinds(events) == [RankLost, InstanceDegraded]
    assert tracker.expire(99.0) == []


def test_a_delete_and_put_of_one_incarnation_within_the_blip_time_is_no_event() -> None:
    tracker = following(A, B)
    assert tracker.changes((deleted(A),), 10.0) == []
    assert tracker.changes((stored(A, 3),), 10.9) == []
    assert tracker.due is None
    assert tracker.expire(99.0) == []


def test_a_delete_and_put_in_one_batch_is_no_event() -> None:
    assert following(A, B).changes((deleted(A), stored(A, 3)), 10.0) == []


def test_a_blip_that_brings_a_changed_record_is_an_update() -> None:
    tracker = following(A, B)
    tracker.changes((deleted(A),), 10.0)
    newer = a_record(version=4)
    assert tracker.changes((stored(newer, 3),), 10.5)[0] == RankUpdated(newer, A)


def test_the_same_incarnation_after_the_blip_time_has_been_lost_and_joins() -> None:
    tracker = following(A, B)
    tracker.changes((deleted(A),), 10.0)
    events = tracker.expire(11.0) + tracker.changes((stored(A, 3),), 11.5)
    assert of_ranks(events) == [RankLost(A, EXPIRED), RankJoined(A)]
    assert of_instances(events) == [InstanceDegraded, InstanceReady]


def test_a_second_delete_does_not_put_the_loss_off() -> None:
    tracker = following(A, B)
    tracker.changes((deleted(A),), 10.0)
    tracker.changes((deleted(A, 3),), 10.9)
    assert tracker.due == 11.0


def test_the_mark_of_an_end_is_a_loss_at_once_and_the_delete_that_follows_is_nothing() -> None:
    tracker = following(A, B)
    events = tracker.changes((stored(a_record(ended="withdrawn"), 2),), 10.0)
    assert events[0] == RankLost(A, "withdrawn")
    assert kinds(events) == [RankLost, InstanceDegraded]
    assert tracker.changes((deleted(A, 3),), 10.1) == []
    assert tracker.due is None


def test_the_mark_of_an_end_ends_doubt_as_well() -> None:
    tracker = following(A, B)
    tracker.changes((deleted(A),), 10.0)
    assert of_ranks(tracker.changes((stored(a_record(ended="evicted"), 3),), 10.1)) == [
        RankLost(A, "evicted")
    ]
    assert tracker.expire(99.0) == []


def test_the_mark_of_an_end_of_a_rank_that_nobody_knew_is_no_event() -> None:
    assert Tracker().changes((stored(a_record(ended="withdrawn")),), 0.0) == []


def test_a_rank_that_offers_other_memory_under_another_incarnation_has_not_been_lost() -> None:
    tracker = following(ALONE)
    moved = replace(ALONE, incarnation=OTHER_INCARNATION, version=ALONE.version + 1)
    assert tracker.changes((stored(moved),), 1.0) == [RankUpdated(moved, ALONE)]


@pytest.mark.parametrize("doubtful", [False, True])
def test_another_incarnation_at_the_key_is_a_loss_and_a_join(doubtful: bool) -> None:
    tracker = following(A, B)
    if doubtful:
        tracker.changes((deleted(A),), 10.0)
    successor = a_record(incarnation=OTHER_INCARNATION, registered_at=LATER)
    assert tracker.changes((stored(successor, 3),), 10.1) == [
        RankLost(A, "replaced by another process"),
        RankJoined(successor),
    ]
    assert tracker.expire(99.0) == []


def test_a_record_that_becomes_damaged_is_lost_and_degrades_until_it_is_good_again() -> None:
    tracker = following(A, B)
    events = tracker.changes((garbage(),), 1.0)
    assert events[0] == RankLost(A, "record damaged")
    assert isinstance(events[1], InstanceDegraded)
    assert "the record at /engines/qwen/0 is damaged" in events[1].status.summary
    assert kinds(tracker.changes((stored(A),), 2.0)) == [RankJoined, InstanceReady]


def test_a_damaged_record_of_an_unknown_rank_degrades_and_its_delete_mends_at_once() -> None:
    tracker = following(ALONE)
    assert kinds(tracker.changes((garbage(rank=1),), 1.0)) == [InstanceDegraded]
    assert kinds(tracker.changes((Deletion(record_key("qwen", 1), 3),), 2.0)) == [InstanceReady]


def test_an_instance_of_damaged_records_only_is_degraded_then_gone() -> None:
    tracker = Tracker()
    assert kinds(tracker.snapshot(snapshot(garbage()), 0.0)) == [InstanceDegraded]
    assert kinds(tracker.snapshot(snapshot(), 1.0)) == [InstanceGone]


def test_keys_that_are_no_records_are_passed_over() -> None:
    foreign = KeyValue("/engines/qwen/readme", b"hello", 1, 1, 0)
    tracker = Tracker()
    assert tracker.snapshot(snapshot(foreign), 0.0) == []
    assert tracker.changes((foreign, Deletion("/engines/qwen/readme", 2)), 1.0) == []


def test_a_snapshot_after_a_gap_yields_exactly_the_difference() -> None:
    c, d = (a_record(instance="other", rank=rank) for rank in (0, 1))
    tracker = following(A, B, c, d)
    newer, successor = (
        a_record(rank=1, version=4),
        a_record(instance="other", incarnation=OTHER_INCARNATION, registered_at=LATER),
    )
    third = a_record(instance="third", world_size=1)
    events = tracker.snapshot(
        snapshot(stored(newer), stored(successor), stored(d), stored(third)), 10.0
    )
    assert of_ranks(events) == [
        RankUpdated(newer, B),
        RankLost(c, "replaced by another process"),
        RankJoined(successor),
        RankJoined(third),
    ]
    assert of_instances(events) == [InstanceDegraded, InstanceReady]
    assert of_ranks(tracker.expire(11.0)) == [RankLost(A, EXPIRED)]


def test_a_snapshot_that_shows_what_is_known_is_no_event() -> None:
    assert following(A, B).snapshot(snapshot(stored(A, 7), stored(B, 8)), 10.0) == []


def test_a_snapshot_does_not_put_a_loss_off_that_is_due_already() -> None:
    tracker = following(A, B)
    tracker.changes((deleted(A),), 10.0)
    tracker.snapshot(snapshot(stored(B)), 10.8)
    assert tracker.due == 11.0


def test_each_state_of_an_instance_is_reported_once() -> None:
    tracker = Tracker(blip_s=0.0)
    records = [a_record(rank=rank, world_size=4) for rank in range(4)]
    events: list[Event] = []
    for record in records:
        events += tracker.changes((stored(record),), 0.0)
    for record in records:
        tracker.changes((deleted(record),), 1.0)
        events += tracker.expire(1.0)
    assert of_instances(events) == [InstanceDegraded, InstanceReady, InstanceDegraded, InstanceGone]


def test_a_release_is_told_once_and_says_which_one_was_before_it() -> None:
    first, second, back = (a_release(version=version) for version in (3, 4, 3))
    tracker = Tracker()
    events = tracker.snapshot(snapshot(stored(A), stored(B), released(first)), 0.0)
    assert kinds(events) == [RankJoined, RankJoined, InstanceReady, VersionReleased]
    assert events[-1] == VersionReleased(first)
    assert tracker.changes((released(first, 2),), 1.0) == []
    assert tracker.changes((released(second, 3),), 1.0) == [VersionReleased(second, first)]
    assert tracker.snapshot(snapshot(stored(A), stored(B), released(second)), 2.0) == []
    assert tracker.changes((released(back, 4),), 2.0) == [VersionReleased(back, second)]


def test_a_release_that_is_put_back_after_its_rank_was_cut_off_is_no_event() -> None:
    tracker = Tracker()
    tracker.snapshot(snapshot(stored(A), stored(B), released(a_release())), 0.0)
    assert tracker.changes((Deletion(release_key("qwen"), 2), deleted(A)), 0.0) == []
    assert tracker.changes((stored(A, 3), released(a_release(), 3)), 0.5) == []
    assert tracker.snapshot(snapshot(stored(A), stored(B)), 1.0) == []
    assert tracker.changes((released(a_release(), 5),), 1.0) == []


def test_a_release_that_cannot_be_read_is_logged_and_no_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = following(A, B)
    assert tracker.changes((KeyValue(release_key("qwen"), b"{", 2, 2, 1),), 1.0) == []
    assert "the release at /releases/qwen is damaged" in caplog.text


def test_a_release_is_told_also_where_its_ranks_are_seen_after_it() -> None:
    tracker = Tracker()
    assert tracker.changes((released(a_release()),), 0.0) == [VersionReleased(a_release())]
    assert VersionReleased not in kinds(tracker.changes((stored(A), stored(B)), 0.0))


@pytest.mark.parametrize(
    "ending",
    [
        (deleted(ALONE),),
        (stored(a_record(world_size=1, ended="withdrawn")), deleted(ALONE)),
        (garbage(), deleted(ALONE)),
    ],
)
def test_nothing_is_remembered_of_an_instance_that_is_gone(ending: tuple[Change, ...]) -> None:
    tracker = following(ALONE)
    tracker.changes((released(a_release()),), 0.0)
    events = tracker.changes(ending, 1.0) + tracker.expire(9.0)
    assert of_instances(events)[-1] is InstanceGone
    assert tracker.changes((Deletion(release_key("qwen"), 9),), 9.0) == []
    held = [value for name, value in vars(tracker).items() if name != "_blip_s"]
    assert held == [{}] * 4
    assert tracker.due is None


def test_a_loss_that_is_due_is_reported_although_other_changes_keep_coming() -> None:
    tracker = following(A, B)
    tracker.changes((deleted(A),), 10.0)
    events = tracker.changes((stored(a_record(rank=1, version=4)),), 20.0)
    assert RankLost(A, EXPIRED) in events


def test_the_cost_of_a_change_does_not_grow_with_the_instance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[int] = []
    agreed = RankRecord.agreed
    monkeypatch.setattr(RankRecord, "agreed", lambda self: looks.append(self.rank) or agreed(self))  # type: ignore[func-returns-value]
    records = [a_record(rank=rank, world_size=200) for rank in range(200)]
    tracker, events = Tracker(blip_s=1.0), list[Event]()
    for record in records:
        events += tracker.changes((stored(record),), 0.0)
    for record in records:
        events += tracker.changes((deleted(record),), 1.0)
    events += tracker.expire(2.0)
    assert of_instances(events) == [InstanceDegraded, InstanceReady, InstanceGone]
    # One look to count each record in, one to count it out, and one at all for the status that
    # comes with each event.
    assert len(looks) <= 2 * len(records) + 2 * len(records)


# -- a watch and its reader
# --------------------------------------------------------------------------------------------------


class Clock:
    """Instead of the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@contextmanager
def watching(feed: Feed) -> Iterator[Watch]:
    with Watch(feed, blip_s=1.0) as watch:
        for _ in feed.items:
            assert isinstance(watch.next(20), RankJoined)
        assert isinstance(watch.next(20), InstanceReady)
        yield watch


def test_a_slow_consumer_does_not_take_a_blip_for_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    feed, clock = Feed(stored(A), stored(B)), Clock()
    with watching(feed) as watch:
        monkeypatch.setattr("engine_registry.watching.inbox.time", clock)
        newer = a_record(rank=1, device="cuda:1")
        feed.give(deleted(A), stored(newer, 3))
        feed.give(stored(A, 4))
        feed.wait_until_taken(2)
        assert watch.next() == RankUpdated(newer, B)
        clock.now += 60.0
        assert watch.next(0.0) is None


def test_what_etcd_holds_back_while_the_inbox_is_full_is_not_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine_registry.watching.inbox._MAX_QUEUED", 1)
    feed, clock = Feed(stored(A), stored(B)), Clock()
    with watching(feed) as watch:
        monkeypatch.setattr("engine_registry.watching.inbox.time", clock)
        updates = [a_record(rank=1, device=f"cuda:{number}") for number in range(3)]
        feed.give(deleted(A), stored(updates[0], 3))
        feed.give(stored(updates[1], 4))
        feed.give(stored(A, 5), stored(updates[2], 6))
        wait_until(lambda: watch._inbox.full)
        clock.now += 60.0
        assert [
            event.record for event in itertools.islice(watch, 3) if isinstance(event, RankUpdated)
        ] == updates


def test_a_key_that_stays_away_is_lost_although_the_consumer_was_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feed, clock = Feed(stored(A), stored(B)), Clock()
    with watching(feed) as watch:
        monkeypatch.setattr("engine_registry.watching.inbox.time", clock)
        feed.give(deleted(A))
        feed.wait_until_taken(1)
        clock.now += 60.0
        assert watch.next(0.0) == RankLost(A, EXPIRED)


def test_while_nobody_consumes_the_inbox_is_bounded_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine_registry.watching.inbox._MAX_QUEUED", 10)
    feed = Feed(stored(A), stored(B))
    with watching(feed) as watch:
        updates = [a_record(rank=1, device=f"cuda:{number}") for number in range(100)]
        for number, update in enumerate(updates):
            feed.give(stored(update, number + 3))
        wait_until(lambda: watch._inbox.full)
        assert (len(watch._inbox), feed.taken) == (10, 10)
        assert [
            event.record for event in itertools.islice(watch, 100) if isinstance(event, RankUpdated)
        ] == updates
        assert (len(watch._inbox), len(watch._events)) == (0, 0)


def test_a_watch_whose_inbox_is_full_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_registry.watching.inbox._MAX_QUEUED", 1)
    feed = Feed(stored(A), stored(B))
    with watching(feed) as watch:
        feed.give(stored(A, 3))
        feed.give(stored(A, 4))
        wait_until(lambda: watch._inbox.full)
    assert watch._inbox.join(60)


# -- ranks whose memory is held
# --------------------------------------------------------------------------------------------------

UNTIL = "2026-01-02T03:09:05.678Z"


def held(record: RankRecord) -> RankRecord:
    return replace(record, ended="process ended", held_until=UNTIL)


def test_a_rank_that_is_held_is_lost_once_and_its_loss_says_until_when_it_is_held() -> None:
    tracker = following(A, B)
    lost, degraded = tracker.changes((stored(held(B), 2),), 10.0)
    assert lost == RankLost(B, "process ended", None, UNTIL)
    assert isinstance(degraded, InstanceDegraded)
    assert (degraded.status.missing, degraded.status.held) == ((1,), (held(B),))
    assert tracker.changes((stored(held(B), 3),), 11.0) == []
    assert tracker.changes((deleted(B),), 12.0) == []  # its time is over
    assert tracker.due is None


def test_a_process_that_takes_the_place_of_a_held_rank_joins_without_another_loss() -> None:
    tracker = following(A, B)
    tracker.changes((stored(held(B), 2),), 10.0)
    heir = replace(B, incarnation=OTHER_INCARNATION, pid=9)
    joined, ready = tracker.changes((stored(heir, 3),), 11.0)
    assert joined == RankJoined(heir)
    assert isinstance(ready, InstanceReady)
    assert (ready.status.held, ready.status.records) == ((), (A, heir))


def test_an_instance_whose_ranks_are_all_held_is_gone_and_what_it_had_is_remembered() -> None:
    tracker = following(A, B)
    events = tracker.changes((stored(held(A), 2), stored(held(B), 3)), 10.0)
    assert kinds(events) == [RankLost, RankLost, InstanceGone]
    assert isinstance(gone := events[-1], InstanceGone)
    assert gone.status.held == (held(A), held(B))
    heir = replace(A, incarnation=OTHER_INCARNATION, pid=9)
    joined, degraded = tracker.changes((stored(heir, 4),), 11.0)
    assert joined == RankJoined(heir)
    assert isinstance(degraded, InstanceDegraded)
    assert degraded.status.held == (held(B),)


@pytest.mark.parametrize("ends", [deleted(ALONE), stored(replace(ALONE, ended="evicted"), 3)])
def test_nothing_is_left_of_a_held_instance_whose_time_is_over(ends: Change) -> None:
    tracker = following(ALONE)
    tracker.changes((stored(held(ALONE), 2),), 10.0)
    assert tracker.changes((ends,), 11.0) == []
    assert tracker.changes((stored(ALONE, 4),), 12.0)[0] == RankJoined(ALONE)
    assert not tracker._rosters["qwen"].held


def test_a_watch_that_begins_while_ranks_are_held_tells_of_those_that_live() -> None:
    tracker = Tracker()
    joined, degraded = tracker.snapshot(snapshot(stored(A), stored(held(B))), 0.0)
    assert joined == RankJoined(A)
    assert isinstance(degraded, InstanceDegraded)
    assert degraded.status.held == (held(B),)
    assert Tracker().snapshot(snapshot(stored(held(A)), stored(held(B))), 0.0) == []


def test_a_watch_that_resumes_forgets_ranks_that_are_not_held_any_more() -> None:
    tracker = following(A, B)
    tracker.changes((stored(held(B), 2),), 10.0)
    assert tracker.snapshot(snapshot(stored(A)), 20.0) == []
    assert not tracker._rosters["qwen"].held


def test_a_rank_that_is_written_as_held_after_its_key_was_gone_is_lost_once() -> None:
    tracker = following(A, B)
    assert tracker.changes((deleted(B),), 10.0) == []
    (lost, _) = tracker.changes((stored(held(B), 3),), 10.5)  # within the time of a blip
    assert lost == RankLost(B, "process ended", None, UNTIL)
    assert tracker.due is None
    tracker = following(A, B)
    tracker.changes((deleted(B),), 10.0)
    assert of_ranks(tracker.expire(11.0)) == [RankLost(B, EXPIRED)]
    assert tracker.changes((stored(held(B), 3),), 12.0) == []


def test_a_held_record_that_is_damaged_is_not_held_and_no_loss() -> None:
    tracker = following(A, B)
    tracker.changes((stored(held(B), 2),), 10.0)
    assert of_ranks(tracker.changes((garbage(rank=1),), 11.0)) == []
    assert not tracker._rosters["qwen"].held


# -- any sequence of changes
# --------------------------------------------------------------------------------------------------

PLACES = st.sampled_from([("a", 0), ("a", 1), ("b", 0)])
LIVE = st.fixed_dictionaries(
    {
        "incarnation": st.sampled_from([INCARNATION, OTHER_INCARNATION]),
        "registered_at": st.sampled_from([A.registered_at, LATER]),
        "generation": st.sampled_from(["launch-1", "launch-2"]),
        "version": st.integers(0, 1),
        "state": st.sampled_from([RankState.READY, RankState.UPDATING]),
    }
)
SEEN = st.one_of(
    st.tuples(st.just("put"), PLACES, LIVE),
    st.tuples(st.just("end"), PLACES, LIVE),
    st.tuples(st.just("hold"), PLACES, LIVE),
    st.tuples(st.just("damage"), PLACES),
    st.tuples(st.just("delete"), PLACES),
    st.tuples(st.just("wait"), st.sampled_from([0.3, 0.7, 1.5])),
)
# What happens after "miss" is not seen until "resync".
STEPS = st.lists(SEEN | st.sampled_from([("miss",), ("resync",)]), max_size=30)


@dataclass
class World:
    """An etcd and a watcher of it, with a log of all events of the watcher."""

    tracker: Tracker = field(default_factory=lambda: Tracker(blip_s=1.0))
    events: list[Event] = field(default_factory=list)
    items: dict[str, KeyValue] = field(default_factory=dict)
    now: float = 0.0
    revision: int = 0
    blind: bool = False

    def do(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("put" | "end" | "hold", (instance, rank), fields):
                record = a_record(instance=instance, rank=rank, **fields)
                if step[0] == "end":
                    record = replace(record, ended="withdrawn")
                self._change(stored(held(record) if step[0] == "hold" else record, self.revision))
            case ("damage", (instance, rank)):
                self._change(garbage(instance, rank))
            case ("delete", (instance, rank)):
                if record_key(instance, rank) in self.items:
                    self._change(Deletion(record_key(instance, rank), self.revision))
            case ("miss",):
                self.blind = True
            case ("resync",):
                self.blind = False
                self.events += self.tracker.snapshot(snapshot(*self.items.values()), self.now)
            case ("wait", seconds):
                self.now += seconds
                self.events += self.tracker.expire(self.now)

    def _change(self, change: Change) -> None:
        self.revision += 1
        if isinstance(change, KeyValue):
            self.items[change.key] = change
        else:
            del self.items[change.key]
        if not self.blind:
            self.events += self.tracker.changes((change,), self.now)

    def records(self) -> dict[str, RankRecord]:
        good = [item for item in self.items.values() if item.value != b"{"]
        return {item.key: decode(item.key, item.value) for item in good}

    def live(self) -> dict[str, RankRecord]:
        return {key: record for key, record in self.records().items() if not record.ended}

    def held(self) -> dict[str, RankRecord]:
        return {key: record for key, record in self.records().items() if record.held}


def replayed(events: list[Event]) -> dict[str, RankRecord]:
    """What a listener believes to be live; fails if an event does not follow from the others."""
    live: dict[str, RankRecord] = {}
    for event in events:
        if isinstance(event, RankJoined):
            assert event.record.key not in live
            live[event.record.key] = event.record
        elif isinstance(event, RankUpdated):
            assert live[event.record.key] == event.previous != event.record
            assert (
                event.previous.incarnation == event.record.incarnation
                or event.previous.registered_at == event.record.registered_at
            )
            live[event.record.key] = event.record
        elif isinstance(event, RankLost):
            assert live.pop(event.record.key) == event.record
    return live


@given(STEPS)
def test_whoever_replays_the_events_of_any_history_holds_exactly_the_live_records(
    steps: list[tuple[Any, ...]],
) -> None:
    world = World()
    for step in [*steps, ("resync",), ("wait", 1.5)]:
        world.do(step)
        assert world.tracker.due is None or world.tracker.due > world.now
    assert replayed(world.events) == world.live()
    assert world.tracker.due is None
    assert {record.key: record for record in world.tracker.held} == world.held()
    assert not any(roster.empty for roster in world.tracker._rosters.values())


@given(STEPS)
def test_the_last_reported_state_of_an_instance_is_its_state_and_none_is_reported_twice(
    steps: list[tuple[Any, ...]],
) -> None:
    world = World()
    for step in [*steps, ("resync",), ("wait", 1.5)]:
        world.do(step)
    for instance in ("a", "b"):
        events = [
            e.status.state
            for e in world.events
            if isinstance(e, INSTANCE_EVENTS) and e.status.instance == instance
        ]
        states = [InstanceState.GONE, *events]
        assert all(before is not after for before, after in itertools.pairwise(states))
        damaged = [
            key for key, item in world.items.items() if item.value == b"{" and parse_record_key(key)
        ]
        ours = [key for key in damaged if key.startswith(f"/engines/{instance}/")]
        assert (
            states[-1]
            is assess(
                instance, [r for r in world.live().values() if r.instance == instance], ours
            ).state
        )


class AssessedRoster(Roster):
    """Looks at all records for each question."""

    @property
    def state(self) -> InstanceState:
        return self.status().state

    def status(self) -> InstanceStatus:
        known = [*self.records.values(), *self.held.values()]
        return assess(self.instance, known, tuple(map(str, self.damaged.values())))


@given(STEPS)
def test_events_say_what_a_look_at_all_records_says_at_that_moment(
    steps: list[tuple[Any, ...]],
) -> None:
    def events() -> list[Event]:
        world = World()
        for step in [*steps, ("resync",), ("wait", 1.5)]:
            world.do(step)
        return world.events

    found = events()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine_registry.watching.tracker.Roster", AssessedRoster)
        wanted = events()
    assert list(map(repr, found)) == list(map(repr, wanted))


def test_an_event_shows_the_instance_as_it_was_then() -> None:
    tracker = following(A, B)
    tracker.changes((deleted(A),), 1.0)
    (_, degraded) = tracker.expire(2.0)
    tracker.changes((stored(A, 3), deleted(B)), 3.0)
    tracker.expire(4.0)
    assert isinstance(degraded, InstanceDegraded)
    assert (degraded.status.records, degraded.status.missing) == ((B,), (0,))


@given(st.lists(SEEN, max_size=30))
def test_a_loss_by_expiry_comes_no_sooner_than_the_blip_time_after_the_key_has_gone(
    steps: list[tuple[Any, ...]],
) -> None:
    world, gone_at = World(), dict[str, float]()
    for step in steps:
        seen = len(world.events)
        before = set(world.items)
        world.do(step)
        gone_at |= dict.fromkeys(before - set(world.items), world.now)
        for event in world.events[seen:]:
            if isinstance(event, RankLost) and event.reason == EXPIRED:
                assert world.now - gone_at[event.record.key] >= 1.0
