"""Which of the ranks that run may be loaded from, as far as their records say."""

from __future__ import annotations

from typing import Any

import pytest

from engine_loader.starting.peers import Peers, find_peers
from engine_registry import ModelIdentity, Place, RankRecord, RankState
from engine_registry.errors import EtcdError, EtcdRefused, EtcdUnavailable, InvalidField
from engine_registry.schema.record import GATEWAY
from tests.support.builders import a_record
from tests.support.fake_etcd import FakeEtcd
from tests.support.shelf import OverFake, shelve

MODEL = ModelIdentity("m", "r1")


def a_rank(**changes: Any) -> RankRecord:
    return a_record(
        **{
            "model": MODEL,
            "rank": 1,
            "world_size": 2,
            "topology": {"tp": (1, 2)},
            **changes,
        }
    )


@pytest.fixture
def etcd() -> FakeEtcd:
    return FakeEtcd()


def peers(
    etcd: FakeEtcd, topology: dict[str, tuple[int, int]] | None = None, boxes: bool = False
) -> Peers:
    return Peers(OverFake(etcd), MODEL, Place(1, 2, topology or {}), boxes)


@pytest.mark.parametrize("topology", [None, {"tp": (1, 2)}])
@pytest.mark.parametrize("theirs", [{}, {"tp": (1, 2)}])
def test_a_ready_rank_of_the_same_place_is_one(
    etcd: FakeEtcd,
    topology: dict[str, tuple[int, int]] | None,
    theirs: dict[str, tuple[int, int]],
) -> None:
    record = shelve(etcd, a_rank(topology=theirs))
    assert peers(etcd, topology).now() == [record]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ModelIdentity("m", "r2")},
        {"rank": 0},
        {"world_size": 4},
        {"topology": {"tp": (0, 2)}},
        {"state": RankState.LOADING},
        {"state": RankState.UPDATING},
        {"state": RankState.DRAINING},
        {"kept_by": GATEWAY},
    ],
)
@pytest.mark.parametrize("indexed", [False, True])
def test_others_are_not(etcd: FakeEtcd, changes: dict[str, Any], indexed: bool) -> None:
    shelve(etcd, a_rank(**changes), indexed=indexed)
    assert peers(etcd, {"tp": (1, 2)}).now() == []


def test_one_that_failed_is_not_asked_again_and_one_that_was_passed_by_is_once_it_changes(
    etcd: FakeEtcd,
) -> None:
    some, record = peers(etcd), shelve(etcd, a_rank())
    some.pass_by([record])
    assert some.now() == []
    changed = shelve(etcd, record)
    assert some.now() == [changed]
    some.give_up([changed])
    assert some.now() == []
    another = shelve(etcd, a_rank(instance="b", incarnation="f" * 32))
    assert some.now() == [another]


def test_of_many_that_failed_the_one_that_did_not_is_found(etcd: FakeEtcd) -> None:
    some = peers(etcd)
    records = [
        shelve(etcd, a_rank(instance=f"i{number}", incarnation=f"{number:032x}"))
        for number in range(100)
    ]
    some.give_up(records[:70] + records[71:])
    assert some.now() == [records[70]]


def test_an_instance_of_another_layout_is_one_for_boxes_only(etcd: FakeEtcd) -> None:
    whole = shelve(etcd, a_rank(rank=0, world_size=1, topology={}))
    shelve(etcd, a_rank(instance="half", rank=0, world_size=4, topology={}, incarnation="f" * 32))
    assert peers(etcd, boxes=True).now() == [whole]
    assert peers(etcd).now() == []


# -- the question of an engine
# --------------------------------------------------------------------------------------------------


def test_an_engine_may_ask_for_peers_with_one_look(etcd: FakeEtcd) -> None:
    registry, record = OverFake(etcd), shelve(etcd, a_rank())
    shelve(etcd, a_rank(rank=0, topology={"tp": (0, 2)}, incarnation="f" * 32))
    assert find_peers(registry, MODEL, rank=1, world_size=2) == (record,)
    assert find_peers(registry, MODEL, rank=1, world_size=2, topology={"tp": (0, 2)}) == ()
    assert find_peers(registry, ModelIdentity("other"), rank=1, world_size=2) == ()


def test_an_engine_whose_tensors_say_their_boxes_finds_peers_of_any_layout(etcd: FakeEtcd) -> None:
    registry = OverFake(etcd)
    shelve(etcd, a_rank(rank=0, world_size=1, topology={}))
    assert find_peers(registry, MODEL, rank=1, world_size=2) == ()
    assert len(find_peers(registry, MODEL, rank=1, world_size=2, boxes=True)) == 1


@pytest.mark.parametrize("error", [EtcdUnavailable("away"), EtcdRefused("no")], ids=repr)
def test_an_engine_that_asks_without_etcd_has_no_peers(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch, error: EtcdError
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(etcd, "read", fail)
    assert find_peers(OverFake(etcd), MODEL, rank=0, world_size=1) == ()


@pytest.mark.parametrize(
    ("field", "wrong"), [("rank", {"rank": 2}), ("topology", {"topology": {"tp": (2, 2)}})]
)
def test_a_question_that_cannot_be_is_refused(field: str, wrong: dict[str, Any]) -> None:
    registry = OverFake(FakeEtcd())
    with pytest.raises(InvalidField) as caught:
        find_peers(registry, MODEL, **{"rank": 0, "world_size": 2, **wrong})
    assert caught.value.details["field"] == field
