"""After which errors a load makes another attempt, with which sources, and what it keeps of what
has come: with a finder and attempts that a test scripts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine_loader import metrics
from engine_loader.errors import Cancelled, LoaderError, SourceLost, TornRead, WeightsMismatch
from engine_loader.loading import attempts as module
from engine_loader.loading.attempt import PlaceTaken
from engine_loader.loading.attempts import PLACES, TRIES, Attempts
from engine_loader.loading.finder import Finder
from engine_loader.loading.job import Job
from engine_loader.loading.lost import LostSources
from engine_loader.loading.report import Filled
from engine_loader.planning.plan import Planner
from engine_loader.planning.reads import Span
from engine_loader.publishing.replica import Republication
from engine_loader.sources.entrance import Entrance
from engine_loader.sources.selection import Choice
from engine_loader.sources.source import SourceRank
from engine_loader.transfer.received import Received
from engine_loader.transfer.shares import Share
from engine_registry import RankRecord, Region
from engine_registry.errors import EtcdUnavailable, RegistryError
from engine_registry.holders.query import Holders
from tests.support.builders import (
    CONTENT,
    OTHER_CONTENT,
    OTHER_INCARNATION,
    a_manifest,
    a_record,
    an_entry,
)

TORN, LOST = TornRead("changed", key="/engines/qwen/0"), SourceLost("it has ended")
DST = a_manifest(an_entry("a", 4096), an_entry("b", 8192))
OWN = a_record(instance="own", incarnation=OTHER_INCARNATION)
CHUNK = 8


def source(record: RankRecord) -> SourceRank:
    return cast(SourceRank, SimpleNamespace(record=record))


FIRST, SECOND = source(a_record(instance="first")), source(a_record(instance="second"))


def choice(*sources: SourceRank, content: str = CONTENT) -> Choice:
    return Choice(content, list(sources))


class Cancel(threading.Event):
    """Is set when it is waited for the `at`th time, or never; nobody waits."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self._at = at
        self.waits: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        return len(self.waits) == self._at


class Search:
    """As a Finder: gives one choice after another, or raises it. `updated` is whether a source is
    being updated, each time that this is asked, and the last of it from then on.
    """

    def __init__(self, *answers: Choice | Exception | None, updated: str = "no") -> None:
        self._answers = list(answers)
        self._updated = updated.split()
        self.deadlines: list[float] = []
        self.crowded = False
        self.seen: Holders | None = None
        self.owns: list[RankRecord | None] = []

    def choose(
        self, deadline: float, received: Received, planner: Planner, own: RankRecord | None
    ) -> Choice | None:
        self.deadlines.append(deadline)
        self.owns.append(own)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def is_one_updated(self) -> bool:
        now = self._updated.pop(0) if len(self._updated) > 1 else self._updated[0]
        return now == "yes"


class Replica:
    """As a Republication, whose memory is registered as these regions."""

    def __init__(self, regions: tuple[Region, ...]) -> None:
        self._regions = regions
        self.record: RankRecord | None = None
        self.began: list[tuple[RankRecord, str]] = []
        self.marked = 0

    def begin(self, like: RankRecord, content: str) -> tuple[Region, ...]:
        self.began.append((like, content))
        self.record = OWN
        return self._regions

    def mark(self, arrivals: object) -> None:
        self.marked += 1

    def complete(self) -> str:
        return "the publication"


class Load:
    """Attempts of a load: each does the next of `script`, and is done where that is None."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        search: Search,
        *script: Exception | Callable[[Received], None] | None,
        cancel: Cancel | None = None,
        replica: Replica | None = None,
    ) -> None:
        self._script = list(script)
        self.search = search
        self.read_from: list[list[SourceRank]] = []
        self.failovers: list[str] = []
        self.retries: list[str] = []
        self.cancel = cancel or Cancel()
        self.deadline = time.monotonic() + 1e6
        self.lost = LostSources()
        self.attempts = Attempts(
            job=cast(
                Job,
                SimpleNamespace(
                    cancel=self.cancel,
                    rank=0,
                    pace=SimpleNamespace(chunk_nbytes=CHUNK),
                    destination=SimpleNamespace(runs=()),
                ),
            ),
            deadline=self.deadline,
            finder=cast(Finder, search),
            entrance=cast(Entrance, None),
            lost=self.lost,
            planner=Planner(DST),
            received=Received("", DST),
            republication=cast("Republication | None", replica),
        )
        monkeypatch.setattr(module, "Attempt", self._attempt)
        monkeypatch.setattr(metrics.FAILOVERS, "inc", self.failovers.append)
        monkeypatch.setattr(metrics.RETRIES, "inc", lambda: self.retries.append(""))

    def _attempt(self, job: Job, choice: Choice, _: object, *others: Any) -> Any:
        sources = choice.sources
        self.read_from.append(sources)
        planner, received, *_ = others
        assert (planner, received) == (self.attempts.planner, self.attempts.received)
        assert planner._dst == received.dst  # no read crosses what the marks are about

        def fill() -> Filled:
            step = self._script.pop(0)
            if isinstance(step, Exception):
                raise step
            if step is not None:
                step(self.attempts.received)
            return Filled(
                sources[0].record,
                [],
                0,
                [],
                0.25,
                0.0,
                verified=False,
                outlived=[],
                within_host=[],
                contents=[CONTENT],
            )

        return SimpleNamespace(fill=fill)


def test_a_load_that_succeeds_at_once_has_waited_for_its_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = Load(monkeypatch, Search(choice(FIRST)), None)
    report = load.attempts.until_filled()
    assert (report.instance, report.retries, report.content) == ("first", 0, CONTENT)
    assert 0 <= report.seconds < 1e3
    assert load.search.deadlines == [load.deadline]


def test_weights_that_change_in_every_try_are_torn_after_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = Load(monkeypatch, Search(*[choice(FIRST)] * 9), *[TORN] * 9)
    with pytest.raises(TornRead) as caught:
        load.attempts.until_filled()
    assert caught.value is TORN
    assert len(load.read_from) == len(load.search.deadlines) == TRIES
    waits = [each for each in load.cancel.waits if each is not None]
    assert len(waits) == TRIES - 1
    assert 0.4 < sum(waits) < 0.6


def test_weights_that_have_changed_are_read_again_from_whoever_has_them_by_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = Load(monkeypatch, Search(choice(FIRST), choice(SECOND)), TORN, None)
    report = load.attempts.until_filled()
    assert (report.instance, report.retries) == ("second", 1)
    assert load.read_from == [[FIRST], [SECOND]]
    assert load.search.deadlines == [load.deadline] * 2


def test_a_load_that_is_cancelled_between_two_tries_makes_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = Load(monkeypatch, Search(choice(FIRST)), TORN, cancel=Cancel(at=1))
    with pytest.raises(Cancelled) as caught:
        load.attempts.until_filled()
    assert caught.value.__cause__ is TORN
    assert load.read_from == [[FIRST]]


def test_weights_that_have_changed_and_that_nobody_has_any_more_are_torn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = Load(monkeypatch, Search(choice(FIRST), None), TORN)
    with pytest.raises(TornRead) as caught:
        load.attempts.until_filled()
    assert caught.value is TORN


def test_a_lost_source_is_replaced_by_another_that_is_there_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = Load(monkeypatch, Search(choice(FIRST), choice(SECOND)), LOST, None)
    report = load.attempts.until_filled()
    assert (report.instance, report.retries) == ("second", 0)
    assert load.search.deadlines[1] <= time.monotonic()  # it does not wait for a new one
    assert load.cancel.waits == []


@pytest.mark.parametrize(
    "then", [None, EtcdUnavailable("away"), WeightsMismatch("another"), SourceLost("gone too")]
)
def test_where_no_other_source_is_there_the_loss_is_the_error(
    monkeypatch: pytest.MonkeyPatch, then: RegistryError | LoaderError | None
) -> None:
    answers = 2 * ([then, None] if isinstance(then, SourceLost) else [then])
    load = Load(monkeypatch, Search(choice(FIRST), *answers), LOST)
    with pytest.raises(SourceLost) as caught:
        load.attempts.until_filled()
    assert caught.value is LOST
    assert len(load.search.deadlines) == 1 + len(answers)


@pytest.mark.parametrize("updated", ["yes", "yes no", "no yes"])
def test_another_that_is_being_updated_is_waited_for_as_at_the_beginning(
    monkeypatch: pytest.MonkeyPatch, updated: str
) -> None:
    """Also where the update ends, or begins, while a source is looked for."""
    search = Search(choice(FIRST), None, choice(SECOND), updated=updated)
    load = Load(monkeypatch, search, LOST, None)
    assert load.attempts.until_filled().instance == "second"
    assert search.deadlines[2] == load.deadline


def test_another_whose_update_came_and_went_between_two_looks_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = Search(choice(FIRST), None, choice(SECOND))
    load = Load(monkeypatch, search, LOST, None)
    assert load.attempts.until_filled().instance == "second"
    assert search.deadlines[2] <= time.monotonic()


def test_each_source_that_a_load_goes_on_without_counts_and_one_that_is_read_again_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose(_: Received) -> None:
        load.lost.add_reasons([Share("first", 0, LOST)])
        raise LOST

    def change(_: Received) -> None:
        assert load.failovers == ["lost"]
        load.lost.add_reasons([Share("first", 0, TORN)])
        raise TORN

    load = Load(monkeypatch, Search(*[choice(FIRST)] * 3), lose, change, None)
    load.attempts.until_filled()
    load.lost.count_failovers()  # as an attempt does that has filled the tensors
    assert load.failovers == ["lost"]
    assert len(load.retries) == 1


def test_where_another_is_there_one_that_is_being_updated_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = Search(choice(FIRST), choice(SECOND), updated="yes")
    assert Load(monkeypatch, search, LOST, None).attempts.until_filled().instance == "second"


def test_a_source_that_goes_while_it_is_chosen_is_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = Load(monkeypatch, Search(LOST, LOST, choice(SECOND)), None)
    assert load.attempts.until_filled().instance == "second"


def test_a_load_all_of_whose_sources_go_while_they_are_chosen_has_lost_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = Load(monkeypatch, Search(LOST, None))
    with pytest.raises(SourceLost) as caught:
        load.attempts.until_filled()
    assert caught.value is LOST
    assert load.read_from == []


@pytest.mark.parametrize(("content", "kept"), [(CONTENT, 8), (OTHER_CONTENT, 0)])
def test_what_has_come_counts_for_another_source_of_the_same_content_only(
    monkeypatch: pytest.MonkeyPatch, content: str, kept: int
) -> None:
    def bring_some(received: Received) -> None:
        received.add(FIRST.record, [Span(4096, 8, ((0, 0),))])
        raise LOST

    search = Search(choice(FIRST), choice(SECOND, content=content))
    load = Load(monkeypatch, search, bring_some, None)
    assert load.attempts.until_filled().content == content
    assert load.attempts.received.arrivals.nbytes == kept


@pytest.mark.parametrize("joined", [False, True], ids=["own regions", "regions of another"])
def test_a_replica_is_registered_before_its_source_is_chosen_among_those_that_load(
    monkeypatch: pytest.MonkeyPatch, joined: bool
) -> None:
    regions = (Region(4096, 8192),) if joined else DST.regions
    replica = Replica(regions)
    search = Search(choice(FIRST), choice(SECOND, FIRST))
    load = Load(monkeypatch, search, None, replica=replica)
    report = load.attempts.until_filled()
    assert cast(object, report.publication) == "the publication"
    assert replica.began == [(FIRST.record, CONTENT)]
    assert search.owns == [None, OWN]
    assert load.read_from == [[SECOND, FIRST]]
    received = load.attempts.received
    assert (received.content, received.dst.regions) == (CONTENT, regions)
    assert len(received.arrivals.blocks) == sum(-(-each.nbytes // CHUNK) for each in regions)
    assert replica.marked


def test_a_replica_whose_load_goes_on_with_another_content_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replica = Replica(DST.regions)
    anew = choice(SECOND, content=OTHER_CONTENT)
    load = Load(
        monkeypatch,
        Search(choice(FIRST), choice(FIRST), anew, anew),
        LOST,
        None,
        replica=replica,
    )
    assert load.attempts.until_filled().content == OTHER_CONTENT
    assert replica.began == [(FIRST.record, CONTENT), (SECOND.record, OTHER_CONTENT)]


def test_a_replica_that_was_withdrawn_begins_anew_and_keeps_what_has_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replica = Replica(DST.regions)

    def bring_some(received: Received) -> None:
        received.add(FIRST.record, [Span(4096, 8, ((0, 0),))])
        replica.record = None
        raise LOST

    search = Search(*[choice(FIRST)] * 4)
    load = Load(monkeypatch, search, bring_some, None, replica=replica)
    load.attempts.until_filled()
    assert replica.began == [(FIRST.record, CONTENT)] * 2
    assert load.attempts.received.arrivals.nbytes == 8


# -- others that are faster
# --------------------------------------------------------------------------------------------------

TAKEN = PlaceTaken("/engines/qwen/0")


def test_where_another_load_was_faster_a_source_is_chosen_anew_and_that_is_no_retry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = Load(monkeypatch, Search(choice(FIRST), choice(SECOND)), TAKEN, None)
    report = load.attempts.until_filled()
    assert load.read_from == [[FIRST], [SECOND]]
    assert (report.retries, load.retries, load.failovers) == (0, [], [])
    assert not load.search.crowded


def test_after_some_that_were_faster_the_place_need_not_be_free_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = Search(*[choice(FIRST)] * (PLACES + 1))
    crowded: list[bool] = []
    steps: list[Exception | Callable[[Received], None] | None] = [TAKEN] * PLACES
    load = Load(monkeypatch, search, *steps, lambda _: crowded.append(search.crowded))
    load.attempts.until_filled()
    assert crowded == [True]
    assert all(wait is not None and wait < 0.1 for wait in load.cancel.waits)


def test_a_load_that_is_cancelled_while_others_are_faster_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = Load(monkeypatch, Search(choice(FIRST)), TAKEN, cancel=Cancel(at=1))
    with pytest.raises(Cancelled):
        load.attempts.until_filled()


def test_where_all_that_were_found_are_lost_meanwhile_the_same_are_tried_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = Load(monkeypatch, Search(choice(FIRST), None), TAKEN, None)
    load.attempts.until_filled()
    assert load.read_from == [[FIRST], [FIRST]]
