"""Ranks with other contents: near ones that are ready, and no more of them than a load may read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import pytest

from engine_loader import InProcessEngine
from engine_loader.sources.others import MOST, OtherSearch
from engine_registry import Location, ModelIdentity, RankRecord, RankState, Registry
from engine_registry.holders.query import HolderQuery, Holders
from engine_registry.watching.waiting import Wanted
from tests.support.builders import CONTENT, OTHER_CONTENT, a_record

HERE = Location("x")
MODEL = ModelIdentity("qwen")


def rank(name: str, number: int = 0, zone: str = "x", **fields: object) -> RankRecord:
    given = {
        "content": OTHER_CONTENT,
        "world_size": 8,
        "topology": {},
        "protocol": "in_process",
        "fabric": "",
        "location": Location(zone),
        "state": RankState.READY,
        **fields,
    }
    key = f"{name}/{number}".encode().hex().ljust(32, "0")
    return a_record(instance=name, rank=number, incarnation=key, **given)


SOURCE = rank("source", content=CONTENT)


class Ranks:
    """As a registry of these ranks, which are read as often as it says, by incarnation."""

    def __init__(
        self, records: Sequence[RankRecord], readers: Mapping[str, int] | None = None
    ) -> None:
        self.records = records
        self.readers = readers or {}
        self.versions: list[int | None] = []  # that were asked for

    def instance(self, name: str) -> Holders:
        return cast(Holders, Status([one for one in self.records if one.instance == name]))

    def find_holders(self, query: HolderQuery) -> Holders:
        self.versions.append(query.version)
        return Holders(
            tuple(
                one
                for one in self.records
                if one.rank == query.place.rank and query.version in (None, one.version)
            )
        )

    def count_pulls(self, records: Sequence[RankRecord]) -> dict[str, int]:
        return {one.incarnation: self.readers.get(one.incarnation, 0) for one in records}


class Status:
    def __init__(self, records: list[RankRecord]) -> None:
        self.records = records


def find(
    ranks: Ranks,
    wanted: Wanted = MODEL,
    sources: Sequence[RankRecord] = (SOURCE,),
    avoid: Sequence[RankRecord] = (),
    max_sources: int = 4,
) -> list[str]:
    """The names of what is found."""
    with InProcessEngine(location=str(HERE)) as engine:
        search = OtherSearch(cast(Registry, ranks), engine, wanted, max_sources)
        found = search.find(sources, [record.incarnation for record in avoid])
    return [record.instance for record in found]


def test_ranks_with_the_content_of_the_sources_are_no_others() -> None:
    assert find(Ranks([SOURCE, rank("a"), rank("same", content=CONTENT)])) == ["a"]


@pytest.mark.parametrize(
    "bad",
    [
        rank("b", state=RankState.UPDATING),
        rank("b", state=RankState.LOADING),
        rank("b", unresponsive_since="2026-01-02T03:04:05.678+00:00"),
        rank("b", protocol="tcp"),
        rank("b", zone="y"),
        rank("b", number=1),
    ],
)
def test_a_rank_that_cannot_be_read_well_is_left_out(bad: RankRecord) -> None:
    assert find(Ranks([bad, rank("a")])) == ["a"]
    assert find(Ranks([bad, rank("a")]), ["a", "b"]) == ["a"]
    assert find(Ranks([bad, rank("a")]), ["b"]) == []


def test_a_rank_that_was_lost_is_left_out() -> None:
    assert find(Ranks([rank("a"), rank("b")]), avoid=[rank("a")]) == ["b"]


def test_those_with_few_readers_come_first_and_no_more_than_a_load_may_read() -> None:
    ranks = [rank(name) for name in "abcde"]
    readers = {one.incarnation: number for number, one in enumerate(reversed(ranks))}
    assert find(Ranks(ranks, readers)) == ["e", "d", "c"]
    two = [SOURCE, replace(SOURCE, instance="other", incarnation="9" * 32)]
    assert find(Ranks(ranks, readers), sources=two) == ["e", "d"]
    assert find(Ranks(ranks, readers), max_sources=1) == []


def test_sources_of_another_zone_are_not_enough() -> None:
    far = replace(SOURCE, location=Location("y"))
    assert len(find(Ranks([rank(name) for name in "abcde"]), sources=[far])) == 4
    away = [rank(name, zone="z") for name in "abcde"]
    assert len(find(Ranks(away), sources=[far])) == 4
    assert find(Ranks([*away, rank("near")]), sources=[far]) == ["near"]


def test_each_place_of_the_sources_gets_others_and_all_together_are_not_many() -> None:
    sources = [rank("source", number, content=CONTENT) for number in range(8)]
    ranks = [rank(name, number) for name in "abcd" for number in range(8)]
    assert len(find(Ranks(ranks), sources=sources, max_sources=2)) == 8
    assert len(find(Ranks(ranks), sources=sources)) == MOST
    assert len(find(Ranks(ranks), sources=sources[3:4])) == 3


def test_of_an_older_version_that_is_found_beside_a_newer_a_sample_is_taken() -> None:
    ranks = Ranks([replace(SOURCE, version=4), rank("a", version=3), rank("b", version=3)])
    assert sorted(find(ranks)) == ["a", "b"]
    assert ranks.versions == [None, 3]
    alone = Ranks([rank("a", version=3), rank("b", version=3)])
    find(alone)
    assert alone.versions == [None]
