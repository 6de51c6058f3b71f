"""Manifests that are fetched: those of the last ranks are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from engine_loader.errors import SourceLost
from engine_loader.sources import manifests
from engine_loader.sources.manifests import fetch_manifests, find_manifests
from engine_registry import Manifest, RankRecord, Registry
from engine_registry.errors import RecordDamaged
from engine_registry.schema.manifest_format import encode
from tests.support.builders import a_manifest, a_record, an_entry


class Asked:
    """A registry that has these manifests. Of the ranks in `damaged` it has records."""

    def __init__(self, *manifests: Manifest, damaged: Sequence[int] = ()) -> None:
        self._manifests = {encode(manifest)[0]: manifest for manifest in manifests}
        self._damaged = damaged
        self.times = 0

    def manifests(self, records: Sequence[RankRecord]) -> list[Manifest | RecordDamaged]:
        self.times += 1
        return [
            self._manifests.get(record.manifest) or RecordDamaged("not there", key=record.key)
            for record in records
        ]

    def current(self, record: RankRecord) -> RankRecord | None:
        return record if record.rank in self._damaged else None


def fetch(asked: Asked, *records: RankRecord) -> list[Manifest]:
    return fetch_manifests(cast(Registry, asked), records)


def record_of(manifest: Manifest, **changes: Any) -> RankRecord:
    return a_record(manifest=encode(manifest)[0], **changes)


@pytest.fixture(autouse=True)
def _nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "_KEPT", manifests._Kept())


def test_a_manifest_is_fetched_once_however_often_its_record_changes() -> None:
    a, b = a_manifest(an_entry("a")), a_manifest(an_entry("b"))
    asked = Asked(a, b)
    for version in range(3):
        assert fetch(asked, record_of(a, version=version)) == [a]
    assert asked.times == 1
    assert fetch(asked, record_of(a), record_of(b)) == [a, b]
    assert asked.times == 2


def test_those_that_were_asked_for_last_are_kept_as_long_as_there_is_room() -> None:
    manifests.keep_manifests(2)
    some = [a_manifest(an_entry(name)) for name in "abc"]
    asked = [Asked(manifest) for manifest in some]

    def times(number: int) -> int:
        fetch(asked[number], record_of(some[number]))
        return asked[number].times

    assert [times(0), times(1), times(0), times(2)] == [1, 1, 1, 1]
    assert [times(0), times(1)] == [1, 2]


def test_what_could_not_be_fetched_is_not_kept() -> None:
    for _ in range(2):
        with pytest.raises(SourceLost):
            fetch(Asked(), record_of(a_manifest()))


def test_several_come_in_one_request_and_one_that_is_missing_keeps_none_from_the_others() -> None:
    some = [a_manifest(an_entry(name)) for name in "abcd"]
    asked = Asked(some[0], some[3], damaged=[2])
    records = [record_of(manifest, rank=rank, world_size=4) for rank, manifest in enumerate(some)]
    found = find_manifests(cast(Registry, asked), [records[0], records[0], *records[1:]])
    assert [found[0], found[1], found[4]] == [some[0], some[0], some[3]]
    assert [type(each) for each in found[2:4]] == [SourceLost, RecordDamaged]
    assert asked.times == 1
    with pytest.raises(SourceLost, match=f"{records[1].key} is not registered any more"):
        fetch(asked, *records)
