"""Several hosts at once: two sources of one load, a chain, and weights that change meanwhile."""

from __future__ import annotations

import pytest

from engine_registry import RankState, Registry
from tests.rdma.guest import Guest
from tests.rdma.hosts import LOAD_S, NBYTES, Load, finish, source

pytestmark = pytest.mark.rdma


def test_two_sources_each_bring_a_part(guests: list[Guest]) -> None:
    here, there = guests
    served = [source(there, "a", launch=1), source(here, "b", launch=1)]
    load = Load(here, "a,b")
    outcome = load.outcome()
    assert outcome.get("origin") == [1, 0, 0], outcome
    assert sum(outcome["nbytes"].values()) == NBYTES
    assert all(outcome["nbytes"][name] > 0 for name in ("a/0", "b/0"))
    finish(load.program, *served)


def test_a_rank_that_is_still_loading_passes_on_what_it_has(
    guests: list[Guest], registry: Registry
) -> None:
    here, there = guests
    served = source(there, "a", launch=1)
    middle = Load(here, "-", NBYTES, "--serve", "b", "--pause", "--crawl", "2")
    middle.wait_for_pause()
    # Patient: the middle one has nothing new for some seconds.
    patient = ("--stall", str(LOAD_S), "--patience", str(LOAD_S))
    last = Load(there, "-", NBYTES, "--serve", "c", "--pause", *patient)
    last.wait_for_pause()
    (record,) = registry.ranks("b")
    assert record.state is RankState.LOADING
    assert [pull.reader and pull.reader.instance for pull in registry.readers(record)] == ["c"]
    middle.go_on()
    last.go_on()
    for load in (middle, last):
        outcome = load.outcome()
        assert outcome.get("origin") == [1, 0, 0], outcome
    assert outcome["nbytes"].get("b/0", 0) > 0, outcome
    finish(last.program, middle.program, served)


def test_an_update_during_a_load_makes_it_begin_again_with_the_new_weights(
    guests: list[Guest],
) -> None:
    here, there = guests
    served = source(there, "a", launch=1)
    load = Load(here, "a", NBYTES, "--pause")
    load.wait_for_pause()
    served.say("begin")
    served.wait_for("begun")
    load.go_on()
    served.say("end")
    served.wait_for("version 1")
    outcome = load.outcome()
    assert outcome.get("origin") == [1, 1, 0], outcome
    assert (outcome["version"], outcome["retries"] > 0) == (1, True)
    finish(load.program, served)
