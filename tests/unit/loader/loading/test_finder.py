"""Sources are searched as a load was asked to, and a second time among whole instances where no
single rank has what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from engine_loader.engines.base import Engine
from engine_loader.errors import (
    DigestsMissing,
    LoaderError,
    SourceLost,
    SourceUnreachable,
    WeightsMismatch,
)
from engine_loader.loading import finder as module
from engine_loader.loading.finder import Finder
from engine_loader.loading.job import Job
from engine_loader.loading.lost import LostSources
from engine_loader.planning.plan import Planner
from engine_loader.sources.groups import Found, Group
from engine_loader.sources.search import Search
from engine_loader.sources.selection import Choice
from engine_loader.transfer.received import Received
from engine_registry import ModelIdentity, Place, RankRecord, Registry
from engine_registry.errors import EtcdUnavailable, InstanceIncomplete, InstanceNotFound
from engine_registry.holders.query import Holders
from tests.support.builders import CONTENT, OTHER_INCARNATION, a_manifest, a_record

REGISTRY, ENGINE = cast(Registry, object()), cast(Engine, SimpleNamespace(session_id="ours"))
DST = a_manifest()
RECEIVED = Received(CONTENT, DST)
PLANNER = Planner(DST)
RANK, OWN = a_record(), a_record(instance="own", incarnation=OTHER_INCARNATION)
ALIKE = Found([Group(CONTENT, [(RANK,)], 1)], [])
INSTANCES = Found([], [Group(CONTENT, [(RANK,)], 1)])
NOTHING = Found([], [])
CHOICE = Choice(CONTENT, [])


@dataclass(frozen=True)
class Searched(Search):
    """Finds the same each time, and writes down with which options it did."""

    found: Found = ALIKE
    asked: list[tuple[object, ...]] = field(default_factory=list)
    seen: list[Holders | None] = field(default_factory=list)
    most: list[int] = field(default_factory=list)
    updated: bool | Exception = False
    answers: list[object] = field(default_factory=list)  # before that

    def find(
        self,
        deadline: float,
        avoid: Collection[str] = (),
        me: RankRecord | None = None,
        content: str = "",
        seen: Holders | None = None,
    ) -> Found:
        self.asked.append((deadline, set(avoid), me, content, self.by_rank, self.pipelined))
        self.seen.append(seen)
        self.most.append(self.max_sources)
        answer = self.answers.pop(0) if self.answers else self.found
        if isinstance(answer, Exception):
            raise answer
        return cast(Found, answer)

    def is_being_updated(self, avoid: Collection[str]) -> bool:
        self.asked.append((set(avoid),))
        if isinstance(self.updated, Exception):
            raise self.updated
        return self.updated


def search(**options: Any) -> Searched:
    defaults = {"boxes": True, "by_rank": True, "pipelined": True, "max_sources": 3}
    return Searched(
        REGISTRY,
        ENGINE,
        ModelIdentity("qwen"),
        Place(0),
        DST,
        **{**defaults, **options},
    )


class Selected:
    """In place of `Selection`: gives one answer after another, or raises it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: Choice | Exception) -> None:
        self._answers = list(answers)
        self.gone = [RANK]
        self.made: list[tuple[Any, ...]] = []
        self.options: dict[str, object] = {}
        monkeypatch.setattr(module, "Selection", self._make)

    def _make(self, *parts: Any, **options: object) -> Selected:
        self.made.append(parts)
        self.options = options
        return self

    def choose(self, found: Found) -> Choice:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def finder(
    searched: Searched, verify: str = "header", publishes: bool = False
) -> tuple[Finder, LostSources]:
    job = SimpleNamespace(
        registry=REGISTRY, engine=ENGINE, verify=verify, rank=1, device=torch.device("cpu")
    )
    lost = LostSources()
    return Finder(cast(Job, job), searched, lost, publishes), lost


@pytest.mark.parametrize("own", [None, OWN])
def test_where_all_are_lost_nothing_is_found(own: RankRecord | None) -> None:
    searched = search(found=NOTHING, boxes=False)
    one, lost = finder(searched)
    lost.add([RANK])
    assert one.choose(7.0, RECEIVED, PLANNER, own) is None
    assert searched.asked == [(7.0, {RANK.incarnation}, own, CONTENT, True, True)]


@pytest.mark.parametrize("error", [None, SourceUnreachable("far away")])
def test_where_nobody_that_has_the_rank_will_do_an_instance_is_tried_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    wider: list[object] = [error or NOTHING, INSTANCES]
    Selected(monkeypatch, CHOICE)
    searched = search(answers=wider)
    one, _ = finder(searched)
    assert one.choose(7.0, RECEIVED, PLANNER, OWN) is CHOICE
    assert [(asked[0], asked[4]) for asked in searched.asked] == [(7.0, True), (0.0, False)]


@pytest.mark.parametrize("missing", [InstanceNotFound("none"), InstanceIncomplete("a half")])
def test_where_there_is_no_instance_either_it_is_as_if_that_had_not_been_tried(
    missing: Exception,
) -> None:
    assert (
        finder(search(answers=[NOTHING, missing]))[0].choose(7.0, RECEIVED, PLANNER, None) is None
    )
    one, _ = finder(search(answers=[SourceUnreachable("far away"), missing]))
    with pytest.raises(SourceUnreachable):
        one.choose(7.0, RECEIVED, PLANNER, None)


def test_where_others_are_faster_again_and_again_the_place_need_not_be_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Selected(monkeypatch, *[Choice(CONTENT, [], free_since=7)] * 2)
    one, _ = finder(search())
    assert one.choose(7.0, RECEIVED, PLANNER, OWN) == Choice(CONTENT, [], free_since=7)
    one.crowded = True
    assert one.choose(7.0, RECEIVED, PLANNER, OWN) == CHOICE


def test_what_was_seen_just_now_is_not_looked_for_again_but_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Selected(monkeypatch, CHOICE, CHOICE)
    searched, seen = search(), Holders((RANK,))
    one, _ = finder(searched)
    one.seen = seen
    for _ in range(2):
        one.choose(7.0, RECEIVED, PLANNER, OWN)
    assert searched.seen == [seen, None]


def test_before_it_registers_a_load_that_publishes_looks_for_one_complete_rank_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    selected = Selected(monkeypatch, CHOICE, CHOICE, CHOICE)
    searched = search()
    one, lost = finder(searched, publishes=True)
    assert one.choose(7.0, RECEIVED, PLANNER, None) is CHOICE
    assert selected.options["max_sources"] == 1
    one.choose(7.0, RECEIVED, PLANNER, OWN)
    lost.add([RANK])
    one.choose(7.0, RECEIVED, PLANNER, None)  # some that load may be all that is left
    assert [asked[5] for asked in searched.asked] == [False, True, True]
    assert searched.most == [1, 3, 3]


@pytest.mark.parametrize("verify", ["header", "digest"])
def test_a_choice_is_made_as_the_load_was_asked_to(
    monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    selected = Selected(monkeypatch, CHOICE)
    one, lost = finder(search(), verify)
    assert one.choose(7.0, RECEIVED, PLANNER, OWN) is CHOICE
    dst, _, planner = selected.made[0]
    assert (dst, planner) == (DST, PLANNER)
    assert selected.options == {
        "digests": verify == "digest",
        "max_sources": 3,
        "engine": ENGINE,
    }
    assert lost.incarnations == {RANK.incarnation}


def test_a_source_is_made_of_each_rank_that_can_be_read_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def made(*parts: Any) -> object:
        if parts[2] is bare:
            raise unreadable
        return parts

    monkeypatch.setattr(module, "SourceRank", made)
    same, bare, gone, cpu = a_record(rank=1), a_record(), a_record(), torch.device("cpu")
    unreadable, lost = SourceLost("it has no bitmap"), SourceLost("it has gone")
    manifests = {id(gone): lost}
    monkeypatch.setattr(
        module,
        "find_manifests",
        lambda _, records: [manifests.get(id(one), DST) for one in records],
    )
    selected = Selected(monkeypatch, CHOICE)
    finder(search())[0].choose(7.0, RECEIVED, PLANNER, OWN)
    sources_of: Callable[[Sequence[RankRecord]], object] = selected.made[0][1]
    assert sources_of([same, bare, RANK, gone]) == [
        (REGISTRY, ENGINE, same, DST, True, cpu),
        unreadable,
        (REGISTRY, ENGINE, RANK, DST, False, cpu),
        lost,
    ]


def test_where_no_rank_has_all_that_is_wanted_all_ranks_of_an_instance_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    selected = Selected(monkeypatch, WeightsMismatch("a half"), CHOICE, CHOICE)
    searched = search()
    one, _ = finder(searched)
    assert one.choose(7.0, RECEIVED, PLANNER, OWN) is CHOICE
    assert [asked[-2:] for asked in searched.asked] == [(True, True), (False, False)]
    assert one.choose(8.0, RECEIVED, PLANNER, OWN) is CHOICE
    assert [asked[-2:] for asked in searched.asked[2:]] == [(False, False)]
    assert [asked[0] for asked in searched.asked] == [7.0, 7.0, 8.0]
    assert [asked[2:4] for asked in searched.asked] == [(OWN, CONTENT)] * 3
    assert [planner for _, _, planner in selected.made] == [PLANNER] * 3


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"found": INSTANCES}, WeightsMismatch("other tensors")),
        ({"by_rank": False}, WeightsMismatch("other tensors")),
        ({"boxes": False}, WeightsMismatch("other tensors")),
        ({}, DigestsMissing("none")),
    ],
    ids=["instances were compared", "they were looked for", "no boxes", "another error"],
)
def test_other_misfits_are_the_error(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: LoaderError
) -> None:
    Selected(monkeypatch, error)
    one, lost = finder(search(**options))
    with pytest.raises(type(error)) as caught:
        one.choose(7.0, RECEIVED, PLANNER, None)
    assert caught.value is error
    assert lost.incarnations == {RANK.incarnation}


@pytest.mark.parametrize(
    ("updated", "found"), [(True, True), (False, False), (EtcdUnavailable("away"), False)]
)
def test_whether_one_is_being_updated_is_not_known_while_etcd_is_away(
    updated: bool | Exception, found: bool
) -> None:
    searched = search(updated=updated)
    one, lost = finder(searched)
    lost.add([RANK])
    assert one.is_one_updated() is found
    assert searched.asked == [({RANK.incarnation},)]
