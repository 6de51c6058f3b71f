"""What news of its registration mean for a rank that is being read: that it may not be read any
more, or, where its memory is mapped, nothing.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from engine_loader.engines.base import Engine
from engine_loader.errors import LoaderError, SourceEvicted, SourceLost, TornRead
from engine_loader.sources import source as module
from engine_loader.sources.source import SourceRank
from engine_registry import Event, RankJoined, RankLost, RankRecord, RankUpdated, Registry
from engine_registry.schema.manifest_format import encode
from tests.support.builders import OTHER_CONTENT, OTHER_INCARNATION, a_manifest, a_record

MANIFEST = a_manifest()
RECORD = a_record(manifest=encode(MANIFEST)[0])
ANOTHER = a_record(incarnation=OTHER_INCARNATION)


def rank(outlives: bool, monkeypatch: pytest.MonkeyPatch) -> SourceRank:
    monkeypatch.setattr(module, "_NEWS_S", 0.0)
    registry = cast(Registry, SimpleNamespace())
    engine = cast(Engine, SimpleNamespace(outlives_sources=outlives, reads_to_host=False))
    return SourceRank(registry, engine, RECORD, MANIFEST, False, torch.device("cpu"))


def lost(reason: str, record: RankRecord = RECORD) -> RankLost:
    return RankLost(record, reason)


ENDS = [
    lost("process ended"),
    lost("withdrawn"),
    lost("lease expired or key deleted"),
    RankJoined(ANOTHER),
    RankUpdated(ANOTHER, RECORD),
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: getattr(end, "reason", type(end).__name__))
def test_a_registration_that_has_ended_is_a_loss(
    monkeypatch: pytest.MonkeyPatch, end: Event
) -> None:
    source = rank(False, monkeypatch)
    source.notice(end)
    assert type(source.news) is SourceLost
    assert not source.outlived
    assert not source.was_evicted()


@pytest.mark.parametrize("end", ENDS, ids=lambda end: getattr(end, "reason", type(end).__name__))
def test_it_is_none_for_an_engine_that_has_its_memory_mapped(
    monkeypatch: pytest.MonkeyPatch, end: Event
) -> None:
    source = rank(True, monkeypatch)
    source.notice(end)
    assert source.news is None
    assert source.outlived
    assert not source.was_evicted()


@pytest.mark.parametrize("outlives", [True, False])
@pytest.mark.parametrize("reason", ["evicted", "its source was evicted"])
@pytest.mark.parametrize("before", [None, "process ended"])
def test_an_eviction_is_a_loss_for_each_engine_also_of_a_process_that_has_ended(
    monkeypatch: pytest.MonkeyPatch, outlives: bool, reason: str, before: str | None
) -> None:
    source = rank(outlives, monkeypatch)
    if before is not None:
        source.notice(lost(before))
    source.notice(lost(reason))
    assert type(source.news) is SourceEvicted
    assert source.was_evicted()


@pytest.mark.parametrize("outlives", [True, False])
@pytest.mark.parametrize("change", [{"version": 9}, {"content": OTHER_CONTENT}])
def test_weights_that_change_are_torn_for_each_engine(
    monkeypatch: pytest.MonkeyPatch, outlives: bool, change: dict[str, object]
) -> None:
    source = rank(outlives, monkeypatch)
    source.notice(RankUpdated(a_record(**change), RECORD))
    assert type(source.news) is TornRead
    assert not source.outlived


@pytest.mark.parametrize("outlives", [True, False])
def test_news_of_others_and_of_nothing_that_changed_are_none(
    monkeypatch: pytest.MonkeyPatch, outlives: bool
) -> None:
    source = rank(outlives, monkeypatch)
    for event in (
        lost("process ended", ANOTHER),
        RankJoined(a_record(rank=1)),
        RankUpdated(RECORD, RECORD),
    ):
        source.notice(event)
    found: LoaderError | None = source.news
    assert (found, source.outlived) == (None, False)


@pytest.mark.parametrize("outlives", [True, False])
def test_where_nobody_says_why_it_has_gone_it_may_have_been_evicted(
    monkeypatch: pytest.MonkeyPatch, outlives: bool
) -> None:
    assert rank(outlives, monkeypatch).was_evicted()
