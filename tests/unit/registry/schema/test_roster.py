"""What is known of one instance as it changes: what `assess` says of all its records at once."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry import InstanceState, InstanceStatus, RankRecord, RankState
from engine_registry.errors import RecordDamaged, SchemaUnsupported
from engine_registry.schema.keys import record_key
from engine_registry.schema.keyvalue import Deletion, KeyValue
from engine_registry.schema.record import Retained
from engine_registry.schema.record_format import decode
from engine_registry.schema.roster import Roster, assess_all
from tests.support.assessment import assess
from tests.support.builders import OTHER_INCARNATION, a_record, garbage, stored

MODEL = a_record().model
RANKS = st.integers(0, 2)
ALL = range(200)
PAST = Retained(2, "1" * 32, 64, 4096)
A_TIME = a_record().registered_at
# Few values of each field, so that records often agree, and world sizes down to 3, so that
# instances are often complete.
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "world_size": st.sampled_from([3, 4]),
        "generation": st.sampled_from(["launch-1", "launch-2"]),
        "model": st.sampled_from(
            [MODEL, replace(MODEL, revision="r2"), replace(MODEL, extra={"layers": "28", "b": ""})]
        ),
        "topology": st.sampled_from([{"tp": (0, 2)}, {"tp": (1, 2)}, {"tp": (1, 4)}, {}]),
        "version": st.sampled_from([3, 4]),
        "retained": st.sampled_from([(), (PAST,), (PAST, Retained(1, "0" * 32, 0))]),
        "state": st.sampled_from(RankState),
        "labels": st.sampled_from([{}, {"tier": "x", "team": "y"}, {"team": "y", "tier": "x"}]),
        "incarnation": st.just(OTHER_INCARNATION),
        "ended": st.sampled_from(["", "withdrawn"]),
        "held_until": st.sampled_from(["", "2026-01-02T03:09:05.678Z"]),
    },
)
CHANGES = st.one_of(
    st.builds(
        lambda rank, fields: stored(a_record(rank=rank, **{"world_size": 3, **fields})),
        RANKS,
        FIELDS,
    ),
    st.builds(lambda rank: stored(a_record(rank=rank, world_size=3)), RANKS),
    st.builds(lambda rank: garbage(rank=rank), RANKS),
    st.builds(lambda rank: Deletion(record_key("qwen", rank), 1), RANKS),
    st.just(KeyValue("/engines/qwen/readme", b"hello", 1, 1, 0)),
    st.just(Deletion("/engines/qwen/readme", 1)),
)


@given(st.lists(CHANGES, max_size=30))
def test_after_any_changes_a_roster_says_what_assess_says_of_the_records(
    changes: list[KeyValue | Deletion],
) -> None:
    roster, items = Roster("qwen"), dict[str, KeyValue]()
    said = []
    complete = [stored(a_record(rank=rank, world_size=3)) for rank in range(3)]
    for change in [*complete, *changes]:
        roster.see(change)
        items.pop(change.key, None)
        if isinstance(change, KeyValue):
            items[change.key] = change
        records, damaged = read(items)
        wanted = assess("qwen", records, damaged)
        said.append((roster.status(), wanted))
        assert roster.state is wanted.state
        assert list(assess_all(items.values())) == (
            [wanted] if wanted.state is not InstanceState.GONE or wanted.held else []
        )
        assert roster.empty == (wanted.state is InstanceState.GONE and not wanted.held)
    assert all(status == wanted for status, wanted in said)  # no later change has changed one


def test_ranks_that_have_gone_on_are_as_they_were_until_all_have() -> None:
    roster = Roster("qwen")

    def snapshot(rank: int, version: int) -> None:
        kept = Retained(version - 1, f"{version - 1:032x}", 64, 4096 * (version - 1))
        now = {"version": version, "content": f"{version:032x}", "shift": 4096 * version}
        roster.see(stored(a_record(rank=rank, world_size=3, retained=(kept,), **now)))

    for rank in range(3):
        snapshot(rank, 5)
    for rank in (1, 0):
        snapshot(rank, 6)
        status = roster.status()
        assert (roster.state, status.version) == (InstanceState.READY, 5)
        assert {(one.content, one.shift) for one in status.records} == {(f"{5:032x}", 5 * 4096)}
        assert not status.problems
    snapshot(0, 7)  # it has not retained 5, and the others have no newer one
    assert roster.state is InstanceState.DEGRADED
    assert "versions differ: 5 (rank 2), 6 (rank 1), 7 (rank 0)" in roster.status().problems
    snapshot(2, 6)
    assert (roster.state, roster.status().version) == (InstanceState.READY, 6)
    newer = roster.status().as_of(7)
    assert newer == roster.status()  # not all have it
    assert roster.status().as_of(6) == roster.status()


@given(st.lists(st.sampled_from(ALL), max_size=30))
def test_many_ranks_come_and_go_in_any_order(ranks: list[int]) -> None:
    roster, records = Roster("qwen"), {rank: a_record(rank=rank, world_size=200) for rank in ALL}
    for rank in sorted(records, key=str):
        roster.put(records[rank])
    said = []
    for rank in ranks:
        if rank in records:
            assert roster.remove(rank) == records.pop(rank)
        else:
            silent = A_TIME if rank % 2 else ""
            records[rank] = a_record(
                rank=rank, world_size=200, version=4, unresponsive_since=silent
            )
            roster.put(records[rank])
        said.append((roster.status(), assess("qwen", records.values())))
    for status, wanted in said:
        assert summed_up(status) == summed_up(wanted)
        assert status == wanted


def summed_up(status: InstanceStatus) -> tuple[Any, ...]:
    return status.world_size, status.nbytes, status.states, status.version, status.unresponsive


@given(FIELDS, FIELDS)
def test_records_are_alike_where_they_agree(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = a_record(**one), a_record(**other)
    assert (first.alike == second.alike) == (first.agreed() == second.agreed())
    assert first.alike != second.alike or hash(first.alike) == hash(second.alike)


@pytest.mark.parametrize("field", a_record().agreed())
def test_records_that_do_not_agree_on_a_field_are_not_alike(field: str) -> None:
    others = [
        a_record(world_size=9),
        a_record(generation="another"),
        a_record(topology={"tp": (0, 9)}),
        a_record(labels={"tier": "y"}),
        a_record(model=replace(MODEL, name="x")),
        a_record(model=replace(MODEL, revision="x")),
        a_record(model=replace(MODEL, dtype="x")),
        a_record(model=replace(MODEL, quantization="x")),
        a_record(model=replace(MODEL, extra={})),
    ]
    (other,) = (one for one in others if one.agreed()[field] != a_record().agreed()[field])
    assert other.alike != a_record().alike


def test_a_status_stays_as_the_instance_was() -> None:
    roster = Roster("qwen")
    roster.put(a_record(rank=0))
    before = roster.status()
    roster.put(a_record(rank=1))
    roster.remove(0)
    roster.damage("/engines/qwen/0", RecordDamaged("it is damaged"))
    assert (before.records, before.missing, before.problems) == ((a_record(rank=0),), (1,), ())


def test_an_instance_is_ready_whenever_all_its_ranks_are_alike() -> None:
    roster = Roster("qwen")
    ready, degraded = InstanceState.READY, InstanceState.DEGRADED
    states = []
    for rank, version in ((0, 3), (1, 3), (1, 4), (1, 3), (1, 4), (0, 4)):
        roster.put(a_record(rank=rank, version=version))
        states.append(roster.state)
    assert states == [degraded, ready, degraded, ready, degraded, ready]
    for rank in (0, 1):
        roster.remove(rank)
        states.append(roster.state)
    assert states[-2:] == [degraded, InstanceState.GONE]


def read(items: dict[str, KeyValue]) -> tuple[list[RankRecord], list[str]]:
    records, damaged = [], []
    for key, item in items.items():
        try:
            if key.endswith("readme"):
                raise RecordDamaged(f"the key {key} is not /engines/<instance>/<rank>")
            records.append(decode(key, item.value))
        except RecordDamaged as exc:
            damaged.append(str(exc))
    return records, damaged


def test_a_change_of_one_rank_looks_at_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    roster = Roster("qwen")
    for rank in range(50):
        roster.see(stored(a_record(rank=rank, world_size=50)))
    looked_at = set[int]()

    def seen(record: RankRecord) -> RankRecord:
        looked_at.add(record.rank)
        return record

    alike, agreed = RankRecord.alike, RankRecord.agreed
    monkeypatch.setattr(RankRecord, "alike", property(lambda self: alike.fget(seen(self))))  # type: ignore[attr-defined]
    monkeypatch.setattr(RankRecord, "agreed", lambda self: agreed(seen(self)))
    for change in (
        stored(a_record(rank=7, world_size=50, version=4)),
        garbage(rank=7),
        Deletion(record_key("qwen", 7), 1),
    ):
        roster.see(change)
        assert roster.state is InstanceState.DEGRADED
    assert looked_at == {7}
    roster.see(stored(a_record(rank=7, world_size=50, generation="launch-2")))
    assert len(roster.status().problems) == 1
    assert looked_at == {0, 7}  # the one that differs, and what it differs from


@pytest.mark.parametrize(
    ("value", "kind"), [(b"{", RecordDamaged), (b'{"schema":3}', SchemaUnsupported)]
)
def test_what_is_wrong_with_a_key_is_kept_without_what_its_traceback_holds(
    value: bytes, kind: type[RecordDamaged]
) -> None:
    roster = Roster("qwen")
    roster.see(garbage(value=value))
    (error,) = roster.damaged.values()
    held: tuple[Any, ...] = (error.__traceback__, error.__cause__, error.__context__)
    assert type(error) is kind
    assert error.details["key"] == record_key("qwen", 0)
    assert held == (None, None, None)


def test_what_is_asked_of_a_status_first_makes_no_difference() -> None:
    roster = Roster("qwen")
    for rank in ALL:
        roster.put(a_record(rank=rank, world_size=200, labels={"tier": "x"}))
    asked, other = roster.status(), roster.status()
    assert (asked.world_size, asked.model, asked.labels) == (200, MODEL, {"tier": "x"})
    assert [record.rank for record in asked.records] == list(ALL)
    assert (asked.world_size, asked.labels) == (200, {"tier": "x"})
    assert pickle.loads(pickle.dumps(other)) == asked  # noqa: S301  ours
    assert replace(other, records=()) == InstanceStatus("qwen", InstanceState.READY)
    assert repr(other) == repr(asked)


UNTIL = "2026-01-02T03:09:05.678Z"


def held(rank: int = 0, until: str = UNTIL, **fields: Any) -> RankRecord:
    return a_record(rank=rank, ended="process ended", held_until=until, **fields)


def test_an_instance_is_gone_but_known_while_a_rank_is_held() -> None:
    roster = Roster("qwen")
    roster.see(stored(a_record()))
    assert roster.end(held()) == a_record()
    assert roster.end(held()) is None  # it had ended already
    status = roster.status()
    assert (roster.state, status.state, roster.empty) == (*[InstanceState.GONE] * 2, False)
    assert (status.records, status.held, status.missing) == ((), (held(),), (0, 1))
    assert (status.world_size, status.model, status.nbytes) == (2, MODEL, 0)
    roster.see(Deletion(record_key("qwen", 0), 2))
    assert roster.empty
    assert roster.status() == InstanceStatus("qwen", InstanceState.GONE)


def test_a_rank_that_is_held_is_missing_and_said_to_be_held() -> None:
    roster = Roster("qwen")
    for rank in (0, 1):
        roster.see(stored(held(rank, world_size=3)))
    roster.see(stored(a_record(rank=2, world_size=3)))
    status = roster.status()
    assert (status.state, status.missing) == (InstanceState.DEGRADED, (0, 1))
    assert status.summary == "missing ranks 0-1 of 3"
    assert status.held_summary == f"ranks 0-1 are held until {UNTIL}: their processes have ended"
    assert roster.lacking(3) == dict.fromkeys((0, 1), f"held until {UNTIL}: its process has ended")
    roster.see(stored(a_record(rank=0, world_size=3, incarnation=OTHER_INCARNATION)))
    assert roster.status().held_summary == f"rank 1 is held until {UNTIL}: its process has ended"
    roster.see(stored(a_record(rank=1, world_size=3, incarnation=OTHER_INCARNATION)))
    assert (roster.state, roster.status().held) == (InstanceState.READY, ())
    assert status.held == (held(0, world_size=3), held(1, world_size=3))  # as it was then


def test_of_several_held_ranks_the_first_that_goes_is_told() -> None:
    roster = Roster("qwen")
    roster.see(stored(held(0, "2026-01-02T03:09:59.000Z")))
    roster.see(stored(held(1)))
    assert UNTIL in roster.status().held_summary


def test_a_rank_of_a_larger_launch_that_is_held_leaves_a_smaller_one_ready() -> None:
    roster = Roster("qwen")
    roster.see(stored(held(1)))
    roster.see(stored(a_record(world_size=1)))
    status = roster.status()
    assert (status.state, status.missing, status.held) == (InstanceState.READY, (), (held(1),))


@pytest.mark.parametrize("after", [stored(a_record(ended="evicted")), garbage()])
def test_a_held_rank_whose_key_says_another_thing_is_not_held_any_more(after: KeyValue) -> None:
    roster = Roster("qwen")
    roster.see(stored(held()))
    roster.see(after)
    assert roster.status().held == ()
