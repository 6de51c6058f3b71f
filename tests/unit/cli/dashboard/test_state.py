"""What the page shows, of events and tickets."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec

from engine_cli.dashboard.journal import Changes
from engine_cli.dashboard.state import MAX_ABSENT, MAX_EVENTS, State
from engine_registry import Event, RankRecord, RankState
from engine_registry.schema.pull_ticket import Reader
from engine_registry.schema.record import ManifestRef
from engine_registry.watching.tracker import Tracker
from tests.support.builders import (
    a_pull,
    a_record,
    a_release,
    deleted,
    garbage,
    released,
    snapshot,
    stored,
)

BEGAN = datetime(2026, 1, 2, 4, tzinfo=timezone.utc)  # the ranks of `a_record` are older
LATER = BEGAN + timedelta(seconds=9)
NEW = LATER.isoformat()


class Page:
    """What a browser has that was told everything; events come from a tracker."""

    def __init__(self) -> None:
        self.state = State(BEGAN)
        self.tracker = Tracker()
        self.entries: dict[tuple[str, str], Any] = {}
        self.revision: int | None = None

    def see(self, events: list[Event]) -> Page:
        for event in events:
            self.state.see(event, LATER)
        return self.look()

    def has(self, *records: RankRecord) -> Page:
        return self.see(self.tracker.snapshot(snapshot(*map(stored, records)), 0.0))

    def changes(self, *records: RankRecord) -> Page:
        return self.see(self.tracker.changes(tuple(map(stored, records)), 1.0))

    def look(self, *pulls: Any, now: float = 0.0) -> Page:
        self.state.look(pulls, now, held=self.tracker.held)
        told: Changes = self.state.since(self.revision)
        self.revision = told.revision
        for key, value in told.entries:
            self.entries[key] = value
        return self

    def instance(self, name: str = "qwen") -> Any:
        return self.entries["instance", name]

    def rank(self, name: str) -> Any:
        return self.entries["rank", name]

    def told(self) -> list[str]:
        return [
            value["text"] for (kind, _), value in sorted(self.entries.items()) if kind == "event"
        ]


def two(**changes: Any) -> list[RankRecord]:
    return [a_record(rank=rank, topology={}, **changes) for rank in range(2)]


def test_a_complete_instance_is_ready_with_its_ranks_version_and_size() -> None:
    page = Page().has(*two())
    shown = page.instance()
    assert (shown["state"], shown["present"], shown["world_size"]) == ("ready", 2, 2)
    assert (shown["version"], shown["nbytes"], shown["model"]) == ("3", 32, "qwen@r1")
    assert page.rank("qwen/1")["session"] == "10.0.0.1:15000"


def test_an_instance_has_its_labels_as_people_would_type_them() -> None:
    page = Page().has(*two(labels={"tier": "gold", "team": "search"}))
    assert page.instance()["labels"] == "team=search,tier=gold"


def test_a_rank_that_does_not_answer_is_unresponsive_since_then() -> None:
    page = Page().has(*two())
    page.changes(a_record(topology={}, unresponsive_since="2026-01-02T03:05:00.000Z"))
    silent, instance = page.rank("qwen/0"), page.instance()
    assert (silent["state"], silent["reason"]) == (
        "unresponsive",
        "has not answered since 2026-01-02T03:05:00.000Z",
    )
    assert (instance["state"], instance["why"]) == ("unresponsive", "rank 0 unresponsive")
    page.changes(*two())
    assert (page.rank("qwen/0")["reason"], page.instance()["why"]) == ("", "")


def test_what_was_there_before_the_page_is_no_news() -> None:
    assert Page().has(*two()).told() == []


def test_what_joins_later_is_news() -> None:
    page = Page().has().changes(*two(registered_at=NEW))
    assert [text.split(":")[0] for text in page.told()] == [
        "qwen/0 joined",
        "qwen/1 joined",
        "qwen ready",
    ]


def test_an_instance_that_was_degraded_before_is_told_of() -> None:
    assert Page().has(two()[0]).told() == ["qwen degraded: missing rank 1 of 2"]


def test_an_instance_that_loads_is_told_of_as_no_loss() -> None:
    page = Page().has(*two(state=RankState.LOADING))
    (told,) = (value for (kind, _), value in page.entries.items() if kind == "event")
    assert (told["kind"], told["text"]) == ("instance_loading", "qwen loading: ranks 0-1 loading")


def test_a_lost_rank_keeps_its_row_with_the_reason() -> None:
    page = Page().has(*two())
    page.changes(a_record(rank=1, topology={}, ended="process ended"))
    assert page.rank("qwen/1")["state"] == "lost"
    assert page.rank("qwen/1")["reason"] == "process ended"
    assert (page.instance()["state"], page.instance()["present"]) == ("incomplete", 1)
    assert page.instance()["why"] == "missing rank 1 of 2"
    assert page.told()[0] == "qwen/1 lost: process ended (host node-1, pid 4711)"


def test_a_lost_rank_that_comes_back_is_a_rank_again() -> None:
    page = Page().has(*two())
    page.changes(a_record(rank=1, topology={}, ended="process ended"))
    page.changes(a_record(rank=1, topology={}, registered_at=NEW))
    assert page.rank("qwen/1")["state"] == "ready"
    assert page.instance()["state"] == "ready"


def test_a_rank_that_is_held_has_a_row_that_says_until_when() -> None:
    until = "2026-01-02T04:05:00.000Z"
    ended = {"topology": {}, "ended": "process ended", "held_until": until}
    page = Page().has(*two())
    page.changes(a_record(rank=1, **ended))
    row, instance = page.rank("qwen/1"), page.instance()
    assert (row["state"], row["reason"], row["nbytes"]) == (
        "held",
        f"held until {until}: its process has ended",
        16,
    )
    assert row["since"] == "2026-01-02T04:00:09.000Z"  # when it was lost
    assert (instance["state"], instance["present"]) == ("incomplete", 1)
    assert instance["why"] == f"missing rank 1 of 2; rank 1 is {row['reason']}"
    page.see(page.tracker.changes((deleted(two()[1]),), 9.0))
    assert (page.rank("qwen/1")["state"], page.instance()["why"]) == ("lost", "missing rank 1 of 2")


def test_an_instance_whose_ranks_are_all_held_stays_until_they_are_not() -> None:
    ended = {"topology": {}, "ended": "process ended", "held_until": "2026-01-02T04:05:00.000Z"}
    held = [a_record(rank=rank, **ended) for rank in range(2)]
    for page in (Page().has(*two()).changes(*held), Page().has(*held)):
        assert (page.instance()["state"], page.instance()["world_size"]) == ("held", 2)
        assert [page.rank(f"qwen/{rank}")["state"] for rank in range(2)] == ["held"] * 2
        page.see(page.tracker.changes(tuple(map(deleted, held)), 9.0))
        assert (page.instance(), page.rank("qwen/0")) == (None, None)
        page.changes(*two())
        assert page.instance()["state"] == "ready"


def test_a_rank_that_never_came_has_a_row_too() -> None:
    assert Page().has(two()[0]).rank("qwen/1")["state"] == "missing"


def test_an_instance_that_claims_very_many_ranks_has_a_bounded_number_of_rows() -> None:
    page = Page().has(a_record(world_size=100_000, topology={}))
    assert sum(kind == "rank" for kind, _ in page.entries) == 1 + MAX_ABSENT


def test_an_instance_that_is_gone_leaves_nothing_behind() -> None:
    page = Page().has(*two())
    page.see(page.tracker.changes(tuple(map(deleted, two())), 1.0))
    page.see(page.tracker.expire(9.0))
    shown = {key: value for key, value in page.entries.items() if value is not None}
    assert not any(kind in ("rank", "instance") for kind, _ in shown)
    assert page.told()[-1] == "qwen gone"


def test_a_damaged_record_is_the_reason_why_its_instance_is_degraded() -> None:
    page = Page()
    page.see(page.tracker.snapshot(snapshot(garbage()), 0.0))
    assert page.instance()["state"] == "degraded"
    assert "record" in page.instance()["why"]


def test_a_loading_rank_shows_its_source_its_progress_and_its_speed() -> None:
    source = a_record(world_size=1, topology={})
    reader = a_record(
        instance="new", world_size=1, topology={}, state=RankState.LOADING, incarnation="ff" * 16
    )
    page = Page().has(source, reader)
    for now, nbytes in ((1.0, 10), (2.0, 40)):
        page.look(a_pull(reader=Reader.of(reader), nbytes=nbytes, total_nbytes=80), now=now)
    shown = page.rank("new/0")
    assert (shown["state"], shown["reads_from"]) == ("loading", "qwen/0")
    assert (shown["fraction"], shown["speed"]) == (0.5, 30)
    assert page.rank("qwen/0")["read_by"] == 1
    assert (page.instance("new")["state"], page.instance("new")["fraction"]) == ("loading", 0.5)
    assert page.entries["picture", ""]["edges"] == [[0, 1]]


def test_a_load_that_has_ended_is_taken_from_its_source() -> None:
    page = Page().has(a_record(world_size=1, topology={}))
    page.look(a_pull()).look()
    assert page.rank("qwen/0")["read_by"] == 0
    assert page.entries["picture", ""]["nodes"] == []


def test_a_version_is_text_as_a_browser_has_no_integers_of_64_bits() -> None:
    page = Page().has(a_record(world_size=1, topology={}, version=(1 << 60) + 1))
    assert page.rank("qwen/0")["version"] == "1152921504606846977"


def test_the_largest_numbers_that_anybody_can_claim_can_be_sent() -> None:
    most = (1 << 63) - 1
    ref = ManifestRef(digest="ab" * 32, parts=1, tensors=1, nbytes=most)
    page = Page().has(*(replace(each, manifest=ref) for each in two()))
    for now, nbytes in ((1.0, 0), (1.001, most)):
        page.look(a_pull(nbytes=nbytes + 1, total_nbytes=most), now=now)
    assert msgspec.json.encode(page.state.since(None).entries)
    assert page.instance()["nbytes"] == most
    assert page.entries["picture", ""]["speed"] == most


def test_equal_contents_show_as_equal() -> None:
    page = Page().has(*two(), *(a_record(instance="b", rank=n, topology={}) for n in range(2)))
    assert page.instance("qwen")["content"] == page.instance("b")["content"] != ""


def test_a_release_is_an_event_unless_it_was_there_before() -> None:
    page = Page().has(*two())
    page.see(page.tracker.changes((released(a_release(released_at="2020-01-01T00:00:00Z")),), 1.0))
    page.see(page.tracker.changes((released(a_release(released_at="2100-01-01T00:00:00Z")),), 1.0))
    told = [value for (kind, _), value in page.entries.items() if kind == "event"]
    assert [(one["kind"], one["instance"], one["rank"]) for one in told] == [
        ("version_released", "qwen", None)
    ]


def test_only_so_many_events_are_kept() -> None:
    page = Page().has(a_record(world_size=1, topology={}))
    for version in range(4, MAX_EVENTS + 9):
        page.changes(a_record(world_size=1, topology={}, version=version))
    assert sum(kind == "event" for kind, _ in dict(page.state.since(None).entries)) == MAX_EVENTS


def test_an_etcd_that_is_away_is_shown_until_it_is_back() -> None:
    page = Page()
    page.state.away("2026-01-02T04:00:00+00:00", "no answer")
    assert page.look().entries["etcd", ""]["reason"] == "no answer"
    page.state.away(None)
    assert page.look().entries["etcd", ""]["away_since"] is None
