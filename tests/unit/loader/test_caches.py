"""What a process keeps between loads has limits, and can be turned off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from engine_loader.caches import limit_caches
from engine_loader.planning.matching import Origin
from engine_loader.planning.plan import Planner
from engine_loader.sources.manifests import fetch_manifest
from engine_registry import Manifest, RankRecord, Registry
from engine_registry.errors import InvalidField
from engine_registry.schema.manifest_format import encode
from tests.support.builders import a_manifest, a_record, an_entry


@pytest.fixture(autouse=True)
def _nothing_is_kept_before_or_after() -> Iterator[None]:
    limit_caches(plans=0, manifest_tensors=0)
    limit_caches()
    yield
    limit_caches(plans=0, manifest_tensors=0)
    limit_caches()


def kept_plans(count: int) -> list[bool]:
    """Of so many plans that are made one after another, which are made again."""
    dst = a_manifest()
    origins = [[Origin("/engines/a/0", a_manifest())] for _ in range(count)]
    made = [Planner(dst).plan(origin) for origin in origins]
    return [any(Planner(dst)._kept(origin) is plan for plan in made) for origin in origins]


class Asked:
    """A registry that counts how often its manifest is fetched."""

    def __init__(self) -> None:
        self.times = 0
        self._manifest = a_manifest(an_entry("a"))
        self.record = a_record(manifest=encode(self._manifest)[0])

    def manifest(self, record: RankRecord) -> Manifest:
        self.times += 1
        return self._manifest

    def fetch(self, times: int) -> int:
        for _ in range(times):
            fetch_manifest(cast(Registry, self), self.record)
        return self.times


def test_by_default_the_last_two_plans_and_some_manifests_are_kept() -> None:
    assert kept_plans(3) == [False, True, True]
    assert Asked().fetch(times=3) == 1


def test_without_caches_nothing_is_kept_and_what_was_kept_is_dropped() -> None:
    asked = Asked()
    assert asked.fetch(times=2) == 1
    limit_caches(plans=0, manifest_tensors=0)
    assert kept_plans(2) == [False, False]
    assert asked.fetch(times=2) == 3


def test_a_limit_that_makes_no_sense_is_refused_and_changes_nothing() -> None:
    for limits in ({"plans": -1}, {"manifest_tensors": -1}, {"plans": 1.5}):
        with pytest.raises(InvalidField, match=next(iter(limits))):
            limit_caches(**limits)
    assert kept_plans(3) == [False, True, True]
