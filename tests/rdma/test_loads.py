"""Weights that come from another host over RDMA are those that it serves, byte for byte."""

from __future__ import annotations

import pytest

from engine_registry import Registry
from tests.rdma.guest import Guest
from tests.rdma.hosts import NBYTES, Load, finish, source

pytestmark = pytest.mark.rdma


def test_large_tensors_arrive_and_again_in_a_second_load_of_the_same_process(
    guests: list[Guest], registry: Registry
) -> None:
    here, there = guests
    served = source(there, "a", launch=3)
    (record,) = registry.ranks("a")
    assert record.protocol == "rdma"
    assert record.session_id.startswith(there.address)
    load = Load(here, "a", NBYTES, "--again")
    for number in range(2):
        if number:
            load.go_on()
        outcome = load.outcome()
        assert outcome.get("origin") == [3, 0, 0], outcome
        assert (outcome["protocol"], outcome["nbytes"]) == ("rdma", {"a/0": NBYTES})
    finish(load.program, served)


def test_1500_small_tensors_arrive_and_their_digests_are_those_of_the_source(
    guests: list[Guest],
) -> None:
    here, there = guests
    nbytes = 1500 * 700 + 5
    served = source(there, "a", nbytes, launch=1, count=1500)
    load = Load(here, "a", nbytes, "--count", "1500", "--verify", "digest")
    outcome = load.outcome()
    assert outcome.get("origin") == [1, 0, 0], outcome
    finish(load.program, served)


def test_columns_are_made_of_the_rows_that_two_ranks_hold(guests: list[Guest]) -> None:
    here, there = guests
    served = source(there, "a", 1 << 20, launch=2, kind="shards")
    load = Load(here, "a", 1 << 20, "--columns", "13:50")
    outcome = load.outcome()
    assert outcome.get("origin") == [2, 0, 0], outcome
    assert set(outcome["nbytes"]) == {"a/0", "a/1"}
    finish(load.program, served)
