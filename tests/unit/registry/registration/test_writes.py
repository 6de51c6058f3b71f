"""The guarded writes: of two writers one succeeds, and the other learns who it was."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from engine_registry import Location, RankLost, RankRecord, RankState
from engine_registry.errors import (
    EtcdRefused,
    EtcdUnavailable,
    Evicted,
    InstanceMismatch,
    RankConflict,
)
from engine_registry.registration.eviction import evict, evict_all, evict_each
from engine_registry.registration.writes import EVICTED, amend, claim, end, remove
from engine_registry.schema.holder import holder_key, holder_keys, parse_entry
from engine_registry.schema.keys import HOLDERS, evicted_key, manifest_part_key, record_key
from engine_registry.schema.keyvalue import Delete, Guard, KeyValue, Put, absent
from engine_registry.schema.record import GATEWAY
from engine_registry.schema.record_format import decode_item, encode
from engine_registry.watching.tracker import Tracker
from tests.support.builders import OTHER_INCARNATION, a_record
from tests.support.fake_etcd import FakeEtcd

PARTS = [b"part 0", b"part 1", b"part 2"]
OURS = a_record()
SIBLING = a_record(rank=1, incarnation=OTHER_INCARNATION)
MODEL = OURS.model


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries of a raced transaction."""
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def etcd() -> FakeEtcd:
    return FakeEtcd()


def put(etcd: FakeEtcd, record: RankRecord) -> int:
    """The record is there, whatever others say; returns its lease."""
    lease_id = etcd.grant(10)
    etcd.commit([], [Put(record.key, encode(record), lease_id)])
    return lease_id


def found(etcd: FakeEtcd, record: RankRecord = OURS) -> RankRecord:
    return decode_item(item(etcd, record))


def item(etcd: FakeEtcd, record: RankRecord = OURS) -> KeyValue:
    there = etcd.get(record.key)
    assert there is not None
    return there


def part_keys(record: RankRecord = OURS) -> list[str]:
    return [
        manifest_part_key(record.instance, record.rank, record.incarnation, number)
        for number in range(len(PARTS))
    ]


# -- the index of holders
# --------------------------------------------------------------------------------------------------


def entries(etcd: FakeEtcd) -> list[tuple[str, RankState, int]]:
    """What the index says: the record's key, its state and its version."""
    some = [parse_entry(one) for one in etcd.snapshot(HOLDERS).items]
    return [(one.record_key, one.state, one.version) for one in some if one is not None]


def test_the_entry_of_a_rank_says_at_any_time_what_its_record_does(etcd: FakeEtcd) -> None:
    lease_id = etcd.grant(10)
    held = claim(etcd, replace(OURS, state=RankState.LOADING), PARTS, lease_id)
    assert entries(etcd) == [(OURS.key, RankState.LOADING, 3)]
    began = decode_item(held).order
    for state, version in [
        (RankState.READY, 3),
        (RankState.UPDATING, 3),
        (RankState.READY, 4),
        (RankState.DRAINING, 4),
    ]:
        amended = amend(etcd, replace(decode_item(held), state=state, version=version), held)
        assert amended is not None
        held = amended
        assert entries(etcd) == [(OURS.key, state, version)]
        assert decode_item(held).order == began
        assert {etcd.lease_of(key) for key in etcd.keys} == {lease_id}
    end(etcd, held, "withdrawn")
    assert etcd.keys == []


def test_a_rank_with_a_location_has_all_its_entries_or_none(etcd: FakeEtcd) -> None:
    lease_id = etcd.grant(10)
    here = replace(OURS, state=RankState.LOADING, location=Location("z", "r", "n"))
    held = claim(etcd, here, PARTS, lease_id)
    assert entries(etcd) == 4 * [(OURS.key, RankState.LOADING, 3)]
    changed = amend(etcd, replace(decode_item(held), state=RankState.READY), held)
    assert changed is not None
    assert entries(etcd) == 4 * [(OURS.key, RankState.READY, 3)]
    assert {etcd.lease_of(key) for key in etcd.keys} == {lease_id}
    moved = claim(etcd, replace(decode_item(changed), location=Location("y")), PARTS, lease_id)
    assert sorted(key for key in etcd.keys if key.startswith(HOLDERS)) == sorted(
        holder_keys(decode_item(moved))
    )
    etcd.refuse_to_revoke = True
    end(etcd, moved, "withdrawn")
    assert etcd.keys == []


def test_a_rank_that_has_ended_is_in_the_index_no_more_even_before_its_lease_is_over(
    etcd: FakeEtcd,
) -> None:
    held = claim(etcd, OURS, PARTS, etcd.grant(10))
    etcd.refuse_to_revoke = True
    end(etcd, held, "withdrawn")
    assert etcd.keys == []
    claim(etcd, OURS, PARTS, etcd.grant(10))
    remove(etcd, OURS, "withdrawn")
    assert etcd.keys == []


def test_whoever_began_after_another_was_registered_comes_after_it(etcd: FakeEtcd) -> None:
    records = [
        decode_item(
            claim(
                etcd,
                a_record(rank=rank, incarnation=f"{9 - rank}" * 32, world_size=9),
                PARTS,
                etcd.grant(10),
            )
        )
        for rank in range(9)
    ]
    assert records == sorted(records, key=lambda record: record.began)
    assert len({record.began for record in records}) == 9


def test_a_registration_keeps_its_order_when_it_is_claimed_again(etcd: FakeEtcd) -> None:
    held = claim(etcd, OURS, PARTS, etcd.grant(10))
    first = decode_item(held)
    claim(etcd, SIBLING, PARTS, etcd.grant(10))
    etcd.expire(held.lease_id)
    again = claim(etcd, first, PARTS, etcd.grant(10))  # as the next keeper does
    assert decode_item(again).order == first.order
    etcd.retry_next_commit = True  # the answer to a claim is lost, of a rank that has no order yet
    third = a_record(rank=0, instance="other", incarnation="3" * 32)
    before = etcd.snapshot("/").revision
    lost = decode_item(claim(etcd, third, PARTS[:1], etcd.grant(10)))
    assert lost.order == before
    assert len(entries(etcd)) == 3


def test_whoever_takes_a_place_over_takes_the_entry_of_the_one_before_out(etcd: FakeEtcd) -> None:
    claim(etcd, OURS, PARTS, etcd.grant(10))
    claim(
        etcd,
        a_record(incarnation=OTHER_INCARNATION, version=9),
        PARTS,
        etcd.grant(10),
        replaces=OURS.incarnation,
    )
    assert entries(etcd) == [(OURS.key, RankState.READY, 9)]


def test_a_rank_that_may_not_write_the_index_is_registered_without(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = etcd.commit

    def refuse(guards: Sequence[Guard], writes: Sequence[Put | Delete]) -> int:
        if any(write.key.startswith(HOLDERS) for write in writes):
            raise EtcdRefused("permission denied", reason="denied")
        return commit(guards, writes)

    monkeypatch.setattr(etcd, "commit", refuse)
    held = claim(etcd, OURS, PARTS, etcd.grant(10))
    assert decode_item(held).order == 0
    assert entries(etcd) == []
    (line,) = [one.message for one in caplog.records]
    assert "/engines/qwen/0 is not in the index of holders" in line
    amended = amend(etcd, replace(decode_item(held), version=9), held)
    assert amended is not None
    end(etcd, amended, "withdrawn")
    assert etcd.keys == []


def test_a_claim_that_etcd_refuses_for_another_reason_is_refused(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def refuse(*_: object) -> int:
        tries.append(1)
        raise EtcdRefused("the request is too large")

    monkeypatch.setattr(etcd, "commit", refuse)
    with pytest.raises(EtcdRefused, match="too large"):
        claim(etcd, OURS, PARTS[:1], etcd.grant(10))
    assert len(tries) == 1


def test_a_seed_of_a_gateway_is_not_in_the_index(etcd: FakeEtcd) -> None:
    claim(etcd, replace(OURS, kept_by=GATEWAY), PARTS, etcd.grant(10))
    assert entries(etcd) == []


# -- claim
# --------------------------------------------------------------------------------------------------


def test_a_claim_writes_manifest_and_record_under_the_lease_and_the_record_last(
    etcd: FakeEtcd,
) -> None:
    lease_id = etcd.grant(10)
    claimed = claim(etcd, OURS, PARTS, lease_id)
    assert found(etcd) == OURS
    assert etcd.get(OURS.key) == claimed
    entry = holder_key(found(etcd))
    assert [change.key for change in etcd.history] == [*part_keys(), OURS.key, entry]
    assert etcd.value(entry) == OURS.key.encode()
    assert [etcd.value(key) for key in part_keys()] == PARTS
    etcd.revoke(lease_id)
    assert etcd.keys == []


def test_a_rank_that_is_held_is_a_conflict_that_names_the_holder(etcd: FakeEtcd) -> None:
    holder = a_record(incarnation=OTHER_INCARNATION, host="node-9", pid=99)
    put(etcd, holder)
    with pytest.raises(
        RankConflict,
        match=r"already registered \(host node-9, pid 99, since 2026-01-02.*"
        r"end its registration with `Registry.evict`",
    ) as caught:
        claim(etcd, OURS, PARTS, etcd.grant(10))
    assert caught.value.details == {
        "key": OURS.key,
        "host": "node-9",
        "pid": 99,
        "since": holder.registered_at,
        "incarnation": OTHER_INCARNATION,
        "instance": "qwen",
        "rank": 0,
    }
    assert found(etcd) == holder


def test_a_holder_that_has_ended_is_replaced(etcd: FakeEtcd) -> None:
    put(etcd, a_record(incarnation=OTHER_INCARNATION, ended="withdrawn"))
    claim(etcd, OURS, PARTS, etcd.grant(10))
    assert found(etcd) == OURS


def test_the_one_registration_that_is_to_be_replaced_is_and_no_other(etcd: FakeEtcd) -> None:
    put(etcd, a_record(incarnation=OTHER_INCARNATION))
    claim(etcd, OURS, PARTS, etcd.grant(10), replaces=OTHER_INCARNATION)
    assert found(etcd) == OURS
    with pytest.raises(RankConflict):
        claim(
            etcd, a_record(incarnation="a third"), PARTS, etcd.grant(10), replaces=OTHER_INCARNATION
        )
    assert found(etcd) == OURS


def test_the_same_incarnation_claims_its_key_again_under_another_lease(etcd: FakeEtcd) -> None:
    first = put(etcd, OURS)
    claim(etcd, replace(OURS, version=4), PARTS, etcd.grant(10))
    etcd.expire(first)
    assert found(etcd).version == 4


def test_the_key_to_delete_is_written_as_etcdctl_wants_it(etcd: FakeEtcd) -> None:
    etcd.config = replace(etcd.config, namespace="/our prod")
    etcd.put(OURS.key, b"{}")
    with pytest.raises(RankConflict, match=r"etcdctl del '/our prod/engines/qwen/0'$"):
        claim(etcd, OURS, PARTS, etcd.grant(10))


def test_a_key_that_holds_no_record_is_a_conflict_that_says_how_to_be_rid_of_it(
    etcd: FakeEtcd,
) -> None:
    etcd.put(OURS.key, b"junk")
    with pytest.raises(RankConflict, match="is damaged") as caught:
        claim(etcd, OURS, PARTS, etcd.grant(10))
    assert caught.value.remedy == (
        "delete the key if no process owns it: etcdctl del /engines/qwen/0"
    )
    assert etcd.value(OURS.key) == b"junk"


DIFFERENCES = [
    ({"world_size": 3}, "world_size", 2, 3),
    ({"generation": "launch-2"}, "generation", "launch-1", "launch-2"),
    ({"model": replace(MODEL, name="llama")}, "model.name", "qwen", "llama"),
    ({"model": replace(MODEL, revision="r2")}, "model.revision", "r1", "r2"),
    ({"model": replace(MODEL, dtype="float16")}, "model.dtype", "bfloat16", "float16"),
    ({"model": replace(MODEL, quantization="fp8")}, "model.quantization", "none", "fp8"),
    ({"model": replace(MODEL, extra={"a": "b"})}, "model.extra", {"layers": "28"}, {"a": "b"}),
    (
        {"topology": {"tp": (1, 2), "pp": (0, 3)}},
        "topology sizes",
        {"pp": 1, "tp": 2},
        {"pp": 3, "tp": 2},
    ),
    ({"labels": {"team": "ads"}}, "labels", {}, {"team": "ads"}),
]


def test_every_field_that_siblings_agree_on_is_tried_below() -> None:
    assert [field for _, field, _, _ in DIFFERENCES] == list(OURS.agreed())


@pytest.mark.parametrize(
    ("changes", "field", "ours", "theirs"),
    DIFFERENCES,
    ids=[field for _, field, _, _ in DIFFERENCES],
)
def test_a_rank_that_disagrees_with_a_sibling_is_refused_with_both_values(
    etcd: FakeEtcd, changes: dict[str, Any], field: str, ours: Any, theirs: Any
) -> None:
    put(etcd, replace(SIBLING, **changes))
    with pytest.raises(InstanceMismatch) as caught:
        claim(etcd, OURS, PARTS, etcd.grant(10))
    assert caught.value.details == {"field": field, "ours": ours, "theirs": theirs, "sibling": 1}
    assert (
        f"rank 0 of 'qwen' has {field} {ours!r}, but rank 1 is registered with {theirs!r}"
        in str(caught.value)
    )
    assert caught.value.remedy.endswith("or choose another name for this instance")
    assert ("`Registry.evict`" in caught.value.remedy) == (field == "generation")
    assert etcd.get(OURS.key) is None


@pytest.mark.parametrize(
    "neighbour",
    [
        replace(SIBLING, generation="launch-0", ended="withdrawn"),
        replace(SIBLING, generation="launch-0", instance="qwen.draft"),
        replace(
            SIBLING,
            topology={"tp": (1, 2), "pp": (0, 1)},
            version=9,
            host="elsewhere",
            protocol="rdma",
        ),
    ],
    ids=["ended", "of another instance", "differs where it may"],
)
def test_what_need_not_agree_does_not_stand_in_the_way(
    etcd: FakeEtcd, neighbour: RankRecord
) -> None:
    put(etcd, neighbour)
    claim(etcd, OURS, PARTS, etcd.grant(10))
    assert found(etcd) == OURS


def test_a_damaged_sibling_neither_agrees_nor_hides_one_that_disagrees(etcd: FakeEtcd) -> None:
    etcd.put(record_key("qwen", 1), b"junk")
    put(etcd, a_record(rank=2, world_size=3))
    with pytest.raises(InstanceMismatch, match="world_size"):
        claim(etcd, OURS, PARTS, etcd.grant(10))


def test_any_number_of_damaged_siblings_does_not_hide_one_that_disagrees(etcd: FakeEtcd) -> None:
    for rank in range(1, 10):
        etcd.put(record_key("qwen", rank), b"junk")
    put(etcd, a_record(rank=10, world_size=11))
    with pytest.raises(InstanceMismatch, match="world_size"):
        claim(etcd, OURS, PARTS, etcd.grant(10))


def test_a_claim_does_not_read_all_its_siblings_where_one_of_the_first_lives(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the ranks of a large instance, which start at once, would each read all the others."""
    for rank in range(1, 12):
        put(etcd, a_record(rank=rank, world_size=12, incarnation=f"{rank:032x}"))
    monkeypatch.setattr(etcd, "snapshot", lambda prefix: pytest.fail(f"reads all of {prefix}"))
    claim(etcd, a_record(world_size=12), PARTS, etcd.grant(10))


def test_of_two_first_comers_that_disagree_the_second_is_refused(etcd: FakeEtcd) -> None:
    etcd.before_commit = lambda: void(put(etcd, replace(SIBLING, generation="launch-2")))
    with pytest.raises(InstanceMismatch, match="generation"):
        claim(etcd, OURS, PARTS[:1], etcd.grant(10))
    assert etcd.keys == [SIBLING.key]


def test_of_two_first_comers_that_agree_both_register(etcd: FakeEtcd) -> None:
    etcd.before_commit = lambda: void(put(etcd, SIBLING))
    claim(etcd, OURS, PARTS[:1], etcd.grant(10))
    assert (found(etcd), found(etcd, SIBLING)) == (OURS, SIBLING)


def test_of_two_processes_that_claim_one_rank_at_once_the_second_is_a_conflict(
    etcd: FakeEtcd,
) -> None:
    rival = a_record(incarnation=OTHER_INCARNATION)
    etcd.before_commit = lambda: void(put(etcd, rival))
    with pytest.raises(RankConflict):
        claim(etcd, OURS, PARTS[:1], etcd.grant(10))
    assert found(etcd) == rival


def test_a_process_that_claims_its_own_rank_again_notices_a_sibling_that_came_meanwhile(
    etcd: FakeEtcd,
) -> None:
    put(etcd, OURS)
    etcd.before_commit = lambda: void(put(etcd, replace(SIBLING, generation="launch-2")))
    with pytest.raises(InstanceMismatch, match="generation"):
        claim(etcd, OURS, PARTS[:1], etcd.grant(10))


def test_a_sibling_that_is_replaced_by_one_that_disagrees_meanwhile_is_noticed(
    etcd: FakeEtcd,
) -> None:
    lease_id = put(etcd, SIBLING)

    def relaunch() -> None:
        etcd.expire(lease_id)
        put(etcd, replace(SIBLING, generation="launch-2"))

    etcd.before_commit = relaunch
    with pytest.raises(InstanceMismatch, match="generation"):
        claim(etcd, OURS, PARTS[:1], etcd.grant(10))


@pytest.mark.parametrize("ending", ["expires", "is updated"])
def test_a_sibling_that_changes_meanwhile_costs_only_another_try(
    etcd: FakeEtcd, ending: str
) -> None:
    lease_id = put(etcd, SIBLING)
    etcd.before_commit = lambda: (
        etcd.expire(lease_id)
        if ending == "expires"
        else void(put(etcd, replace(SIBLING, version=9)))
    )
    claim(etcd, OURS, PARTS[:1], etcd.grant(10))
    assert found(etcd) == OURS


def test_a_claim_that_is_raced_for_ever_gives_up_and_says_try_again(etcd: FakeEtcd) -> None:
    lease_id = put(etcd, SIBLING)

    def race() -> None:
        etcd.commit([], [Put(SIBLING.key, encode(SIBLING), lease_id)])
        etcd.before_commit = race

    etcd.before_commit = race
    with pytest.raises(EtcdUnavailable, match="too many others are registering at once: try again"):
        claim(etcd, OURS, PARTS[:1], etcd.grant(10))
    assert etcd.get(OURS.key) is None


def test_a_claim_whose_answer_is_lost_can_be_made_again(etcd: FakeEtcd) -> None:
    lease_id = etcd.grant(10)
    etcd.lose_next_answer = True
    with pytest.raises(EtcdUnavailable):
        claim(etcd, OURS, PARTS[:1], lease_id)
    claim(etcd, OURS, PARTS[:1], lease_id)
    assert found(etcd) == OURS


def test_a_claim_that_was_written_but_tried_again_is_made(etcd: FakeEtcd) -> None:
    etcd.retry_next_commit = True
    claimed = claim(etcd, OURS, PARTS[:1], etcd.grant(10))
    assert (found(etcd), etcd.get(OURS.key)) == (OURS, claimed)


# -- amend
# --------------------------------------------------------------------------------------------------


def test_an_amended_record_replaces_the_one_that_was_read(etcd: FakeEtcd) -> None:
    lease_id = put(etcd, OURS)
    newer = replace(OURS, version=4)
    amended = amend(etcd, newer, item(etcd))
    assert (found(etcd), item(etcd)) == (newer, amended)
    assert etcd.lease_of(OURS.key) == lease_id


def test_a_record_that_another_has_changed_is_not_amended(etcd: FakeEtcd) -> None:
    put(etcd, OURS)
    before = item(etcd)
    rival = replace(OURS, incarnation=OTHER_INCARNATION)
    put(etcd, rival)
    assert amend(etcd, replace(OURS, version=4), before) is None
    assert found(etcd) == rival


# -- a store that was wiped
# --------------------------------------------------------------------------------------------------


RIVAL = replace(OURS, incarnation=OTHER_INCARNATION)


def wiped(etcd: FakeEtcd, *records: RankRecord) -> KeyValue:
    """OURS as it stood before, in a store that then held these instead, at the same revision."""
    put(etcd, OURS)
    before = item(etcd)
    lease_id = etcd.grant(10)
    puts = [Put(record.key, encode(record), lease_id) for record in records]
    etcd.restore(puts, back_to_revision=before.mod_revision - 1)
    assert {each.mod_revision for each in etcd.snapshot("/").items} == {before.mod_revision}
    return before


# -- the end
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_a_registration_whose_lease_may_not_be_revoked_deletes_its_keys(
    etcd: FakeEtcd, full: bool
) -> None:
    held = claim(etcd, OURS, PARTS, etcd.grant(10))
    etcd.refuse_to_revoke, etcd.full = True, full
    end(etcd, held, "done")
    assert etcd.keys == []


def test_a_registration_that_ends_says_why_before_its_keys_go(etcd: FakeEtcd) -> None:
    end(etcd, claim(etcd, OURS, PARTS, etcd.grant(10)), "done")
    last = next(change for change in reversed(etcd.history) if isinstance(change, KeyValue))
    assert decode_item(last).ended == "done"
    assert (etcd.keys, etcd.leases) == ([], {})


def test_what_stands_under_the_key_of_a_registration_is_removed_if_it_is_its_own(
    etcd: FakeEtcd,
) -> None:
    claim(etcd, OURS, PARTS, etcd.grant(10))
    remove(etcd, OURS, "done")
    assert etcd.keys == []


@pytest.mark.parametrize(
    "value", [None, b"damaged", encode(a_record(incarnation=OTHER_INCARNATION))]
)
def test_nothing_else_is_removed(etcd: FakeEtcd, value: bytes | None) -> None:
    if value is not None:
        etcd.put(OURS.key, value)
    before = list(etcd.history)
    remove(etcd, OURS, "done")
    assert etcd.history == before


def test_in_a_wiped_store_no_other_incarnation_at_the_same_revision_is_evicted(
    etcd: FakeEtcd,
) -> None:
    before = wiped(etcd, RIVAL)
    assert not evict(etcd, decode_item(before))
    assert (etcd.keys, found(etcd)) == ([RIVAL.key], RIVAL)


def test_in_a_wiped_store_no_other_incarnation_at_the_same_revision_is_ended(
    etcd: FakeEtcd,
) -> None:
    before = wiped(etcd, RIVAL)
    end(etcd, before, "withdrawn")
    assert found(etcd) == RIVAL


def test_in_a_wiped_store_no_other_incarnation_at_the_same_revision_is_amended(
    etcd: FakeEtcd,
) -> None:
    before = wiped(etcd, RIVAL)
    assert amend(etcd, replace(OURS, version=4), before) is None
    assert found(etcd) == RIVAL


@pytest.mark.parametrize("place", ["holder", "sibling"])
def test_a_claim_does_not_mistake_what_stands_in_a_store_wiped_meanwhile_for_what_it_looked_at(
    etcd: FakeEtcd, place: str
) -> None:
    """As where the store comes back between its look and its write, and knows the lease: restored
    from a backup.
    """
    looked_at = replace(OURS, ended="withdrawn") if place == "holder" else SIBLING
    stands = RIVAL if place == "holder" else replace(SIBLING, generation="launch-2")
    put(etcd, looked_at)
    revision, lease_id = item(etcd, looked_at).mod_revision, etcd.grant(10)
    etcd.before_commit = lambda: etcd.restore(
        [Put(stands.key, encode(stands), 0)], back_to_revision=revision - 1
    )
    with pytest.raises(RankConflict if place == "holder" else InstanceMismatch):
        claim(etcd, OURS, PARTS[:1], lease_id)
    assert found(etcd, stands) == stands


# -- evict
# --------------------------------------------------------------------------------------------------


def test_eviction_deletes_record_and_manifest_of_this_registration_only(etcd: FakeEtcd) -> None:
    for record in (OURS, SIBLING):
        claim(etcd, record, PARTS, etcd.grant(10))
    assert evict(etcd, found(etcd))
    mark = evicted_key("qwen", 0, OURS.incarnation)
    left = [key for key in etcd.keys if not key.startswith("/holders/")]
    assert left == sorted([SIBLING.key, *part_keys(SIBLING), mark])


def test_a_watcher_sees_an_eviction_at_once_and_as_what_it_is(etcd: FakeEtcd) -> None:
    put(etcd, OURS)
    tracker = Tracker()
    tracker.snapshot(etcd.snapshot("/engines/"), 0.0)
    before = len(etcd.history)
    evict(etcd, found(etcd))
    events = tracker.changes(tuple(etcd.history[before:]), 0.0)
    (lost,) = [event for event in events if isinstance(event, RankLost)]
    assert (lost.record, lost.reason) == (OURS, EVICTED)
    assert lost.eviction is not None
    assert lost.eviction.by.endswith(f"@{socket.gethostname()}")
    assert tracker.due is None


def test_an_evicted_registration_cannot_come_back_but_its_successor_can_register(
    etcd: FakeEtcd,
) -> None:
    put(etcd, OURS)
    evict(etcd, found(etcd))
    with pytest.raises(Evicted):
        claim(etcd, OURS, PARTS, etcd.grant(10))
    successor = a_record(incarnation=OTHER_INCARNATION)
    claim(etcd, successor, PARTS, etcd.grant(10))
    assert found(etcd) == successor


def test_an_eviction_between_a_claims_look_and_its_write_is_noticed(etcd: FakeEtcd) -> None:
    put(etcd, OURS)
    etcd.before_commit = lambda: void(evict(etcd, found(etcd)))
    with pytest.raises(Evicted):
        claim(etcd, OURS, PARTS[:1], etcd.grant(10))
    assert etcd.get(OURS.key) is None


def test_a_mark_of_eviction_that_comes_between_a_claims_look_and_its_write_is_noticed(
    etcd: FakeEtcd,
) -> None:
    etcd.before_commit = lambda: etcd.put(evicted_key("qwen", 0, OURS.incarnation), b"")
    with pytest.raises(Evicted):
        claim(etcd, OURS, PARTS[:1], etcd.grant(10))
    assert etcd.get(OURS.key) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda etcd: put(etcd, replace(OURS, version=4)),
        lambda etcd: put(etcd, a_record(incarnation=OTHER_INCARNATION)),
        lambda etcd: etcd.delete(OURS.key),
    ],
    ids=["updated", "replaced", "gone"],
)
def test_a_registration_that_has_changed_since_it_was_read_is_not_evicted(
    etcd: FakeEtcd, change: Callable[[FakeEtcd], object]
) -> None:
    put(etcd, OURS)
    read = found(etcd)
    change(etcd)
    keys, leases = etcd.keys, etcd.leases
    assert not evict(etcd, read)
    assert (etcd.keys, etcd.leases) == (keys, leases)


def test_an_eviction_that_was_written_but_tried_again_is_finished_and_keeps_its_mark(
    etcd: FakeEtcd,
) -> None:
    put(etcd, OURS)
    etcd.retry_next_commit = True
    assert evict(etcd, found(etcd))
    assert etcd.keys == [evicted_key("qwen", 0, OURS.incarnation)]
    with pytest.raises(Evicted):
        claim(etcd, OURS, PARTS, etcd.grant(10))


def test_of_two_evictions_at_once_one_has_done_it(etcd: FakeEtcd) -> None:
    put(etcd, OURS)
    read = found(etcd)
    results: list[bool] = []
    etcd.before_commit = lambda: results.append(evict(etcd, read))
    results.append(evict(etcd, read))
    assert results == [True, False]
    assert etcd.keys == [evicted_key("qwen", 0, OURS.incarnation)]
    assert len(etcd.leases) == 2  # the rank's, which its keeper gives back, and the mark's


def test_an_etcd_without_space_evicts_without_a_mark_and_leaves_the_lease_for_the_keeper_to_notice(
    etcd: FakeEtcd,
) -> None:
    lease_id = put(etcd, OURS)
    etcd.full = True
    assert evict(etcd, found(etcd))
    assert etcd.keys == []
    assert list(etcd.leases) == [lease_id]


def test_an_etcd_that_fills_up_during_an_eviction_still_deletes(etcd: FakeEtcd) -> None:
    lease_id = put(etcd, OURS)
    etcd.before_commit = lambda: setattr(etcd, "full", True)
    assert evict(etcd, found(etcd))
    assert (etcd.keys, list(etcd.leases)) == ([], [lease_id])


def test_an_etcd_without_space_does_not_evict_what_has_changed_since_it_was_read(
    etcd: FakeEtcd,
) -> None:
    put(etcd, OURS)
    read = found(etcd)
    put(etcd, replace(OURS, version=4))
    etcd.full = True
    assert not evict(etcd, read)
    assert found(etcd).version == 4


def test_a_record_that_was_never_in_etcd_cannot_be_evicted(etcd: FakeEtcd) -> None:
    with pytest.raises(ValueError, match="only a record that was read from etcd"):
        evict(etcd, OURS)


# -- evict several at once
# --------------------------------------------------------------------------------------------------


def a_launch(etcd: FakeEtcd, ranks: int) -> list[KeyValue]:
    records = [
        a_record(rank=rank, world_size=99, incarnation=f"{rank:032x}") for rank in range(ranks)
    ]
    for record in records:
        put(etcd, record)
    return [item(etcd, record) for record in records]


def test_several_are_evicted_in_one_transaction_with_their_marks_under_one_lease(
    etcd: FakeEtcd,
) -> None:
    launch = a_launch(etcd, 3)
    before, leases = len(etcd.history), set(etcd.leases)
    assert evict_all(etcd, launch)
    # to end and mark them, to delete them
    assert len({change.mod_revision for change in etcd.history[before:]}) == 2
    (mark_lease,) = set(etcd.leases) - leases
    assert etcd.keys == sorted(evicted_key("qwen", rank, f"{rank:032x}") for rank in range(3))
    assert {etcd.lease_of(key) for key in etcd.keys} == {mark_lease}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("failing", ["one has changed", "a condition"])
def test_of_several_none_is_evicted_where_one_has_changed_or_a_condition_fails(
    etcd: FakeEtcd, failing: str, full: bool
) -> None:
    launch = a_launch(etcd, 3)
    missing = a_record(rank=3, world_size=99)
    put(etcd, missing if failing == "a condition" else replace(decode_item(launch[1]), version=9))
    keys, leases = etcd.keys, etcd.leases
    etcd.full = full
    assert not evict_all(etcd, launch, absent(missing.key))
    assert (etcd.keys, etcd.leases) == (keys, leases)
    assert not any(decode_item(item(etcd, decode_item(each))).ended for each in launch)


def test_of_several_the_others_go_also_where_the_keeper_of_one_was_faster(etcd: FakeEtcd) -> None:
    launch = a_launch(etcd, 3)

    def the_keeper_notices() -> None:
        etcd.delete(launch[1].key)

    def marking() -> None:
        etcd.before_commit = the_keeper_notices

    etcd.before_commit = marking
    assert evict_all(etcd, launch)
    assert etcd.keys == sorted(evicted_key("qwen", rank, f"{rank:032x}") for rank in range(3))


def test_several_that_were_evicted_but_tried_again_are_finished(etcd: FakeEtcd) -> None:
    launch = a_launch(etcd, 3)
    etcd.retry_next_commit = True
    assert evict_all(etcd, launch)
    assert etcd.keys == sorted(evicted_key("qwen", rank, f"{rank:032x}") for rank in range(3))


def test_of_several_records_those_that_have_not_changed_are_evicted(etcd: FakeEtcd) -> None:
    launch = a_launch(etcd, 5)
    records = [decode_item(each) for each in launch]
    put(etcd, replace(records[1], version=9))

    def rank_3_leaves() -> None:
        etcd.delete(launch[3].key)

    etcd.before_commit = rank_3_leaves
    assert evict_each(etcd, records) == (True, False, True, False, True)
    assert [key for key in etcd.keys if key.startswith("/engines/")] == [launch[1].key]
    assert evict_each(etcd, records) == (False,) * 5
    assert evict_each(etcd, []) == ()


def void(_: object) -> None:
    """Hooks return nothing."""
