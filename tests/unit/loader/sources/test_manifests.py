"""Manifests that are fetched: those of the last ranks are kept."""

from __future__ import annotations

from typing import cast

import pytest

from engine_loader.errors import SourceLost
from engine_loader.sources import manifests
from engine_loader.sources.manifests import fetch_manifest
from engine_registry import Manifest, RankRecord, Registry
from engine_registry.errors import RecordDamaged
from engine_registry.schema.manifest_format import encode
from tests.support.builders import a_manifest, a_record, an_entry


class Asked:
    """A registry that has this manifest for every record, or none."""

    def __init__(self, manifest: Manifest | None) -> None:
        self._manifest = manifest
        self.times = 0

    def manifest(self, record: RankRecord) -> Manifest:
        self.times += 1
        if self._manifest is None:
            raise RecordDamaged("not there", key=record.key)
        return self._manifest

    def current(self, record: RankRecord) -> RankRecord | None:
        return None


def record_of(manifest: Manifest) -> RankRecord:
    return a_record(manifest=encode(manifest)[0])


@pytest.fixture(autouse=True)
def _nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "_KEPT", manifests._Kept())


def test_a_manifest_is_fetched_once_however_often_its_record_changes() -> None:
    manifest = a_manifest(an_entry("a"))
    asked = Asked(manifest)
    record = record_of(manifest)
    for version in range(3):
        assert (
            fetch_manifest(
                cast(Registry, asked), a_record(manifest=record.manifest, version=version)
            )
            is manifest
        )
    assert asked.times == 1
    fetch_manifest(cast(Registry, asked), record_of(a_manifest(an_entry("b"))))
    assert asked.times == 2


def test_those_that_were_asked_for_last_are_kept_as_long_as_there_is_room() -> None:
    manifests.keep_manifests(2)
    some = [a_manifest(an_entry(name)) for name in "abc"]
    asked = [Asked(manifest) for manifest in some]

    def fetch(number: int) -> int:
        fetch_manifest(cast(Registry, asked[number]), record_of(some[number]))
        return asked[number].times

    assert [fetch(0), fetch(1), fetch(0), fetch(2)] == [1, 1, 1, 1]
    assert [fetch(0), fetch(1)] == [1, 2]


def test_what_could_not_be_fetched_is_not_kept() -> None:
    for _ in range(2):
        with pytest.raises(SourceLost):
            fetch_manifest(cast(Registry, Asked(None)), record_of(a_manifest()))
