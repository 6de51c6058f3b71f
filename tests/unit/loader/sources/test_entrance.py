"""A load enters the sources of an attempt: which of them, with which tickets, and who hears it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from engine_loader import Progress
from engine_loader.sources.entrance import Entered, Entrance
from engine_loader.sources.selection import Choice
from engine_loader.sources.source import SourceRank
from engine_registry import Event, InstanceGone, RankLost, RankRecord, Registry
from engine_registry.errors import EtcdRefused
from engine_registry.holders.query import Holders
from engine_registry.pulls.queries import all_pulls, count_pulls
from engine_registry.pulls.taking import Pulling, take_ticket
from engine_registry.schema.keyvalue import Delete, Guard, Outcome, Put, Range, Snapshot
from engine_registry.schema.pull_ticket import Reader
from engine_registry.schema.record_format import decode_item
from tests.support.assessment import assess
from tests.support.builders import CONTENT, a_record
from tests.support.fake_etcd import FakeEtcd
from tests.support.shelf import shelve
from tests.support.waiting import wait_until

OWN = a_record(instance="own", incarnation="5" * 32)


class Refusing(FakeEtcd):
    """Takes no tickets to read from `denied` instances."""

    def __init__(self) -> None:
        super().__init__()
        self.denied: set[str] = set()

    def decide(
        self,
        guards: Sequence[Guard],
        writes: Sequence[Put | Delete],
        then: Sequence[Range] = (),
        otherwise: Sequence[Range] = (),
    ) -> Outcome:
        if any(write.key.split("/")[2] in self.denied for write in writes):
            raise EtcdRefused("permission denied", reason="denied")
        return super().decide(guards, writes, then, otherwise)


class Door:
    """A registry and four sources. Each source keeps the events that it gets."""

    def __init__(self) -> None:
        self.etcd = Refusing()
        self.ranks = [
            shelve(self.etcd, a_record(instance=name, incarnation=name * 32)) for name in "abcd"
        ]
        self.lent: list[str] = []
        self.told: list[tuple[str, Event]] = []
        self.watched: list[tuple[list[str], Snapshot | None]] = []
        self.stopped = 0
        self.tell: Callable[[Event], object] = lambda event: None
        self.entrance = Entrance(cast(Registry, self))

    def pulling(self) -> Pulling:
        return Pulling(self.etcd)

    def current(self, record: RankRecord) -> RankRecord | None:
        found = self.etcd.get(record.key)
        return decode_item(found) if found is not None else None

    def watch_ranks(self, records: Sequence[RankRecord], start: Snapshot | None) -> object:
        self.watched.append(([record.instance for record in records], start))
        return SimpleNamespace(
            call=lambda on_event: setattr(self, "tell", on_event),
            stop=lambda: setattr(self, "stopped", self.stopped + 1),
        )

    def enter(
        self, undo: ExitStack, since: int | None = None, holders: Holders | None = None
    ) -> Entered:
        choice = Choice(CONTENT, list(map(self._source, self.ranks)), since, holders)
        return self.entrance.enter(choice, OWN, undo)

    def _source(self, record: RankRecord) -> SourceRank:
        return cast(
            SourceRank,
            SimpleNamespace(
                record=record,
                follow=lambda now: False,  # it is of another content by now
                lend=lambda undo: self.lent.append(record.instance),
                notice=lambda event: self.told.append((record.instance, event)),
            ),
        )


@pytest.fixture
def door() -> Door:
    return Door()


def names(entered: Entered) -> list[str]:
    return [source.record.instance for source in entered.sources]


def test_all_are_entered_with_tickets_and_a_watch_that_begins_with_them(door: Door) -> None:
    with ExitStack() as undo:
        entered = door.enter(undo)
        assert names(entered) == door.lent == [*"abcd"]
        (watched,) = door.watched
        assert watched[0] == [*"abcd"]
        assert watched[1] is not None
        assert len(watched[1].items) == 4
        pulls = all_pulls(door.etcd)
        assert {pull.reader for pull in pulls} == {Reader.of(OWN)}
        assert len({pull.load_id for pull in pulls}) == len(door.etcd.leases) == 1
        lost = RankLost(door.ranks[1], "withdrawn")
        for event in (lost, RankLost(OWN, "withdrawn"), InstanceGone(assess("b", []))):
            door.tell(event)
        assert door.told == [("b", lost)]
    assert (door.stopped, all_pulls(door.etcd)) == (1, ())
    door.entrance.close()
    assert not door.etcd.leases


def test_progress_is_told_in_all_tickets(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_registry.pulls.ticket._REPORT_S", 0.001)
    with ExitStack() as undo:
        door.enter(undo).report(Progress(5, 10))
        wait_until(lambda: [pull.nbytes for pull in all_pulls(door.etcd)] == [5] * 4)


def test_those_that_others_were_faster_to_are_told_from_those_that_changed(door: Door) -> None:
    holders = Holders(tuple(door.ranks), readers={}, revision=door.etcd.read([])[0])
    shelve(door.etcd, replace(door.ranks[2], version=9))
    with ExitStack() as undo:
        undo.enter_context(take_ticket(door.etcd, door.ranks[0]) or undo)
        entered = door.enter(undo, holders.revision, replace(holders, ready=holders.ready[:2]))
        assert names(entered) == door.watched[0][0] == ["b", "d"]
        sources = [door._source(record) for record in door.ranks]
        assert list(map(entered.is_taken, sources)) == [True, False, False, False]
        assert entered.holders is not None
        assert entered.holders.readers == {"a" * 32: 1, "b" * 32: 0}
        assert entered.holders.revision > holders.revision


def test_where_nobody_can_be_entered_nobody_is_watched(door: Door) -> None:
    revision, _ = door.etcd.read([])
    with ExitStack() as undo:
        undo.enter_context(take_ticket(door.etcd, door.ranks[0]) or undo)
        door.ranks = door.ranks[:1]
        assert names(door.enter(undo, revision)) == []
    assert (door.watched, door.lent) == ([], [])
    door.entrance.close()
    assert not door.etcd.leases


def test_sources_without_tickets_are_read_all_the_same_and_the_others_keep_theirs(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    door.etcd.denied = {"b"}
    with ExitStack() as undo:
        assert names(door.enter(undo)) == [*"abcd"]
        assert list(count_pulls(door.etcd, door.ranks).values()) == [1, 0, 1, 1]
        assert door.watched == [([*"abcd"], None)]
    door.etcd.available = False
    with ExitStack() as undo:
        assert names(door.enter(undo)) == [*"abcd"]
    warnings = [record.message.split(" without")[0] for record in caplog.records]
    assert warnings == [f"reading from /engines/{name}/0" for name in "babcd"]
