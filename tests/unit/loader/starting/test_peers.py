"""Which of the ranks that run may be loaded from, as far as their records say."""

from __future__ import annotations

from typing import Any

import pytest

from engine_loader.starting.peers import Peers, find_peers
from engine_registry import (
    InstanceReady,
    InstanceStatus,
    ModelIdentity,
    Place,
    RankJoined,
    RankLost,
    RankRecord,
    RankState,
    RankUpdated,
    Registry,
)
from engine_registry.errors import EtcdError, EtcdRefused, EtcdUnavailable, InvalidField
from engine_registry.schema.record import GATEWAY
from engine_registry.schema.status import assess
from tests.support.builders import a_record

MODEL = ModelIdentity("m", "r1")


def peers(topology: dict[str, tuple[int, int]] | None = None, boxes: bool = False) -> Peers:
    return Peers(None, MODEL, Place(1, 2, topology or {}), boxes)  # type: ignore[arg-type]


def a_rank(**changes: Any) -> RankRecord:
    return a_record(
        **{
            "model": MODEL,
            "rank": 1,
            "world_size": 2,
            "topology": {"tp": (1, 2)},
            "mod_revision": 7,
            **changes,
        }
    )


@pytest.mark.parametrize("topology", [None, {"tp": (1, 2)}])
def test_a_ready_rank_of_the_same_place_is_one(topology: dict[str, tuple[int, int]] | None) -> None:
    assert peers(topology).are_in(RankJoined(a_rank()))
    assert peers(topology).are_in(RankUpdated(a_rank(), a_rank(state=RankState.LOADING)))
    assert peers(topology).are_in(RankJoined(a_rank(topology={})))


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
def test_others_are_not(changes: dict[str, Any]) -> None:
    assert not peers({"tp": (1, 2)}).are_in(RankJoined(a_rank(**changes)))
    assert not peers().are_in(RankLost(a_rank(), "withdrawn"))


def test_one_that_failed_is_not_asked_again_and_one_that_was_passed_by_is_once_it_changes() -> None:
    some = peers()
    some.pass_by([a_rank()])
    assert not some.are_in(RankJoined(a_rank()))
    assert some.are_in(RankUpdated(a_rank(mod_revision=8), a_rank()))
    some.give_up([a_rank()])
    assert not some.are_in(RankUpdated(a_rank(mod_revision=8), a_rank()))
    assert some.are_in(RankJoined(a_rank(incarnation="f" * 32)))


def test_an_instance_of_another_layout_is_one_for_boxes_only() -> None:
    status = assess("a", [a_rank(rank=0, world_size=1, topology={})])
    assert peers(boxes=True).are_in(InstanceReady(status))
    assert not peers().are_in(InstanceReady(status))
    half = assess("a", [a_rank(rank=0, world_size=4, topology={})])
    assert not peers(boxes=True).are_in(InstanceReady(half))


# -- the question of an engine
# --------------------------------------------------------------------------------------------------


class Known(Registry):
    """Knows these ranks, or cannot be asked."""

    def __init__(self, *found: RankRecord, error: EtcdError | None = None) -> None:
        self._found = found
        self._error = error
        self.looks = 0

    def instances(self, selector: str = "") -> tuple[InstanceStatus, ...]:
        self.looks += 1
        if self._error is not None:
            raise self._error
        return (assess("a", list(self._found)),)


def test_an_engine_may_ask_for_peers_with_one_look() -> None:
    registry = Known(a_rank(), a_rank(rank=0, topology={"tp": (0, 2)}))
    assert find_peers(registry, MODEL, rank=1, world_size=2) == (a_rank(),)
    assert registry.looks == 1
    assert find_peers(registry, MODEL, rank=1, world_size=2, topology={"tp": (0, 2)}) == ()
    assert find_peers(registry, ModelIdentity("other"), rank=1, world_size=2) == ()


def test_an_engine_whose_tensors_say_their_boxes_finds_peers_of_any_layout() -> None:
    registry = Known(a_rank(rank=0, world_size=1, topology={}))
    assert find_peers(registry, MODEL, rank=1, world_size=2) == ()
    assert len(find_peers(registry, MODEL, rank=1, world_size=2, boxes=True)) == 1


@pytest.mark.parametrize("error", [EtcdUnavailable("away"), EtcdRefused("no")], ids=repr)
def test_an_engine_that_asks_without_etcd_has_no_peers(error: EtcdError) -> None:
    assert find_peers(Known(error=error), MODEL, rank=0, world_size=1) == ()


@pytest.mark.parametrize(
    ("field", "wrong"), [("rank", {"rank": 2}), ("topology", {"topology": {"tp": (2, 2)}})]
)
def test_a_question_that_cannot_be_is_refused(field: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidField) as caught:
        find_peers(Known(), MODEL, **{"rank": 0, "world_size": 2, **wrong})
    assert caught.value.details["field"] == field
