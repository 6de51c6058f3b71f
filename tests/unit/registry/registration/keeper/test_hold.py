"""The keeper of a rank whose process has ended: it says in etcd that the rank is held, and gives
way to everybody.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine_registry import Location, RankRecord
from engine_registry.errors import Evicted, RankConflict, Superseded
from engine_registry.registration.eviction import evict
from engine_registry.registration.keeper.holder import Keeper
from engine_registry.registration.writes import claim, remove
from engine_registry.schema.keys import HOLDERS, MANIFESTS
from engine_registry.schema.keyvalue import Put
from engine_registry.schema.record_format import decode_item, encode
from tests.support.builders import OTHER_INCARNATION, a_record
from tests.support.fake_etcd import FakeEtcd, FakeKeyWatch

TTL_S = 9.0
PARTS = [b"part 0", b"part 1"]
UNTIL = "2026-11-30T12:00:00.000Z"
OURS = a_record(location=Location("z"))
NEXT = a_record(incarnation=OTHER_INCARNATION, location=Location("z"))
HELD = replace(OURS, ended="process ended", held_until=UNTIL)


@pytest.fixture(params=[False, True], ids=["watched", "not watched"])
def etcd(request: pytest.FixtureRequest) -> FakeEtcd:
    etcd = FakeEtcd()
    etcd.refuse_to_watch = request.param
    return etcd


def a_keeper(etcd: FakeEtcd, record: RankRecord = OURS) -> Keeper:
    watch = FakeKeyWatch(etcd, record.key)
    return Keeper(etcd, record, PARTS, TTL_S, lambda _: None, watch)


@pytest.fixture
def keeper(etcd: FakeEtcd) -> Keeper:
    """Its rank has registered, and then died."""
    keeper = a_keeper(etcd)
    keeper.register()
    assert len(entries(etcd)) == 2
    keeper.hold(UNTIL)
    return keeper


@pytest.fixture
def holding(keeper: Keeper) -> Keeper:
    """That is in etcd."""
    keeper.beat()
    return keeper


def found(etcd: FakeEtcd) -> RankRecord | None:
    item = etcd.get(OURS.key)
    return decode_item(item) if item else None


def entries(etcd: FakeEtcd) -> list[str]:
    return [key for key in etcd.keys if key.startswith(HOLDERS)]


def parts(etcd: FakeEtcd) -> list[bytes]:
    return [etcd.value(key) for key in etcd.keys if key.startswith(MANIFESTS)]


# -- what is in etcd
# --------------------------------------------------------------------------------------------------


def test_a_rank_that_is_held_keeps_its_lease_and_manifest_and_is_in_no_index(
    etcd: FakeEtcd, holding: Keeper
) -> None:
    (lease_id,) = etcd.leases
    assert found(etcd) == HELD
    assert parts(etcd) == PARTS
    assert entries(etcd) == []
    assert {etcd.lease_of(key) for key in etcd.keys} == {lease_id}
    before = list(etcd.history)
    assert holding.beat() == TTL_S / 3
    assert etcd.renewed[-1] == lease_id
    assert etcd.history == before


def test_a_rank_that_did_not_answer_before_it_died_is_only_held(etcd: FakeEtcd) -> None:
    keeper = a_keeper(etcd)
    keeper.register()
    keeper.mark("2026-11-30T11:00:00.000Z")
    keeper.beat()
    keeper.hold(UNTIL)
    keeper.beat()
    assert found(etcd) == HELD


def test_its_end_leaves_nothing(etcd: FakeEtcd, holding: Keeper) -> None:
    holding.end("process ended")
    assert (etcd.keys, etcd.leases) == ([], {})


def test_an_end_that_does_not_know_the_lease_leaves_no_record_and_no_entry(
    etcd: FakeEtcd, keeper: Keeper
) -> None:
    remove(etcd, OURS, "process ended")
    assert etcd.keys == []


def test_an_answer_that_is_lost_is_found_and_nothing_is_written_twice(
    etcd: FakeEtcd, keeper: Keeper
) -> None:
    etcd.lose_next_answer = True
    assert keeper.beat() < TTL_S / 3
    before = list(etcd.history)
    assert keeper.beat() == TTL_S / 3
    assert etcd.history == before
    assert found(etcd) == HELD


def test_a_lease_that_is_lost_is_replaced_and_no_entry_comes_back(
    etcd: FakeEtcd, holding: Keeper
) -> None:
    for _ in range(2):
        etcd.expire_all()
        holding.beat()
        assert found(etcd) == HELD
        assert parts(etcd) == PARTS
        assert entries(etcd) == []
        assert len(etcd.leases) == 1


@pytest.mark.parametrize("expired", [False, True])
def test_an_etcd_that_was_away_when_the_rank_died_gets_it_as_held(
    etcd: FakeEtcd, keeper: Keeper, expired: bool
) -> None:
    etcd.available = False
    for _ in range(3):
        keeper.beat()
    if expired:
        etcd.expire_all()
    etcd.available = True
    keeper.beat()
    assert found(etcd) == HELD
    assert entries(etcd) == []


def test_memory_that_was_offered_last_is_held_with_its_manifest(etcd: FakeEtcd) -> None:
    """Its keeper had not written it yet."""
    keeper = a_keeper(etcd)
    keeper.register()
    moved = replace(OURS, incarnation="d" * 32, version=4, header_addr=8192)
    keeper.change(moved, [b"other"])
    keeper.hold(UNTIL)
    keeper.beat()
    assert found(etcd) == replace(moved, ended="process ended", held_until=UNTIL)
    assert parts(etcd) == [b"other"]
    assert entries(etcd) == []


def test_a_keeper_that_took_over_and_had_not_claimed_yet_holds_the_rank(etcd: FakeEtcd) -> None:
    a_keeper(etcd).register()
    etcd.expire_all()
    keeper = a_keeper(etcd)
    keeper.hold(UNTIL)
    keeper.beat()
    assert found(etcd) == HELD


def test_a_backup_in_which_the_rank_lives_is_corrected(etcd: FakeEtcd, holding: Keeper) -> None:
    (lease_id,) = etcd.leases
    etcd.restore([Put(OURS.key, encode(OURS), lease_id)], 100)
    holding.beat()
    assert found(etcd) == HELD
    assert parts(etcd) == PARTS


def test_an_etcd_without_space_shows_no_rank_that_lives_and_gets_it_as_held_later(
    etcd: FakeEtcd, keeper: Keeper
) -> None:
    etcd.full = True
    keeper.beat()
    assert (etcd.keys, etcd.leases) == ([], {})
    keeper.beat()
    etcd.full = False
    keeper.beat()
    assert found(etcd) == HELD
    assert entries(etcd) == []


# -- others
# --------------------------------------------------------------------------------------------------


def lost(keeper: Keeper, error: type[Exception]) -> None:
    """With its next beat, or the one after: one that finds its lease gone claims next."""

    def beats() -> None:
        for _ in range(2):
            keeper.beat()

    with pytest.raises(error):
        beats()


def test_another_process_takes_the_place_of_a_rank_that_is_held(
    etcd: FakeEtcd, holding: Keeper
) -> None:
    (lease_id,) = etcd.leases
    successor = a_keeper(etcd, NEXT)
    successor.register()
    lost(holding, Superseded)
    assert lease_id not in etcd.leases
    assert found(etcd) == NEXT
    assert parts(etcd) == PARTS
    assert len(entries(etcd)) == 2
    successor.beat()


def test_a_process_that_comes_before_the_end_is_written_stays(
    etcd: FakeEtcd, keeper: Keeper
) -> None:
    """The lease has expired while etcd was away."""
    etcd.expire_all()
    successor = a_keeper(etcd, NEXT)
    successor.register()
    lost(keeper, Superseded)
    assert found(etcd) == NEXT
    successor.beat()


@pytest.mark.parametrize("ended", ["", "process ended"])
def test_a_rank_that_is_held_never_takes_the_place_of_one_that_is_held_since(
    etcd: FakeEtcd, holding: Keeper, ended: str
) -> None:
    etcd.expire_all()
    successor = a_keeper(etcd, NEXT)
    successor.register()
    if ended:
        successor.hold(UNTIL)
        successor.beat()
    lost(holding, Superseded)
    now = found(etcd)
    assert now is not None
    assert (now.incarnation, now.ended) == (NEXT.incarnation, ended)
    successor.beat()


def test_whoever_claims_between_the_look_and_the_write_wins(etcd: FakeEtcd, keeper: Keeper) -> None:
    lease_id = etcd.grant(10)
    etcd.before_commit = lambda: etcd.put(OURS.key, encode(NEXT))
    lost(keeper, Superseded)
    assert found(etcd) == NEXT
    etcd.revoke(lease_id)


def test_a_rank_that_lives_gives_way_to_none_that_is_held(etcd: FakeEtcd) -> None:
    a_keeper(etcd, NEXT).register()
    with pytest.raises(RankConflict):
        claim(etcd, HELD, PARTS, etcd.grant(10))


def test_a_process_that_has_taken_the_memory_need_not_wait_until_the_end_is_written(
    etcd: FakeEtcd, keeper: Keeper
) -> None:
    (lease_id,) = etcd.leases
    watch = FakeKeyWatch(etcd, NEXT.key)
    adopter = Keeper(etcd, NEXT, PARTS, TTL_S, lambda _: None, watch, replaces=OURS.incarnation)
    adopter.register()
    lost(keeper, Superseded)
    assert lease_id not in etcd.leases
    assert found(etcd) == NEXT
    assert len(entries(etcd)) == 2
    assert {etcd.lease_of(key) for key in etcd.keys} == set(etcd.leases)
    with pytest.raises(RankConflict):
        a_keeper(etcd, replace(NEXT, incarnation="e" * 32)).register()


def evict_now(etcd: FakeEtcd) -> None:
    record = found(etcd)
    assert record is not None
    assert evict(etcd, record)


def test_a_rank_that_is_held_can_be_evicted(etcd: FakeEtcd, holding: Keeper) -> None:
    evict_now(etcd)
    assert found(etcd) is None
    lost(holding, Evicted)
    assert not entries(etcd)
    assert len(etcd.leases) == 1  # of the mark


def test_an_eviction_whose_first_half_is_there_is_one(etcd: FakeEtcd, holding: Keeper) -> None:
    """Its second one deletes the key."""
    seen: list[Any] = []

    class HalfWay(Exception):
        pass

    def after_the_mark() -> None:
        def stop() -> None:
            seen.append(found(etcd))
            raise HalfWay

        etcd.before_commit = stop

    etcd.before_commit = after_the_mark
    with pytest.raises(HalfWay):
        evict_now(etcd)
    (marked,) = seen
    assert (marked.ended, marked.held) == ("evicted", False)
    lost(holding, Evicted)


def test_a_rank_that_was_evicted_before_its_end_is_written_is_not_held(
    etcd: FakeEtcd, keeper: Keeper
) -> None:
    evict_now(etcd)
    lost(keeper, Evicted)
    assert found(etcd) is None


def test_a_rank_that_was_evicted_while_its_lease_was_lost_is_not_held(
    etcd: FakeEtcd, holding: Keeper
) -> None:
    evict_now(etcd)
    for lease_id in list(etcd.leases):
        if etcd.leases[lease_id] == TTL_S:
            etcd.expire(lease_id)
    lost(holding, Evicted)
    assert found(etcd) is None


@pytest.mark.parametrize("expired", [False, True])
def test_siblings_of_another_launch_need_not_agree_with_a_rank_that_is_held(
    etcd: FakeEtcd, holding: Keeper, expired: bool
) -> None:
    if expired:
        etcd.expire_all()
    sibling = a_record(rank=1, incarnation="b" * 32, generation="launch-2")
    a_keeper(etcd, sibling).register()
    holding.beat()
    assert found(etcd) == HELD
