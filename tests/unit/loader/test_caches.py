"""What a process keeps between loads has limits, and can be turned off."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine_loader.caches import limit_caches
from engine_loader.planning.matching import Origin
from engine_loader.planning.plan import Planner
from engine_registry.errors import InvalidField
from tests.support.builders import a_manifest, an_entry
from tests.unit.loader.sources.test_manifests import Asked, fetch, record_of

MANIFEST = a_manifest(an_entry("a"))


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


def fetched(times: int, of: Asked) -> int:
    """How often it has been asked for its manifest, after so many fetches more."""
    for _ in range(times):
        fetch(of, record_of(MANIFEST))
    return of.times


def test_by_default_the_last_two_plans_and_some_manifests_are_kept() -> None:
    assert kept_plans(3) == [False, True, True]
    assert fetched(3, Asked(MANIFEST)) == 1


def test_without_caches_nothing_is_kept_and_what_was_kept_is_dropped() -> None:
    asked = Asked(MANIFEST)
    assert fetched(2, asked) == 1
    limit_caches(plans=0, manifest_tensors=0)
    assert kept_plans(2) == [False, False]
    assert fetched(2, asked) == 3


def test_a_limit_that_makes_no_sense_is_refused_and_changes_nothing() -> None:
    for limits in ({"plans": -1}, {"manifest_tensors": -1}, {"plans": 1.5}):
        with pytest.raises(InvalidField, match=next(iter(limits))):
            limit_caches(**limits)
    assert kept_plans(3) == [False, True, True]
