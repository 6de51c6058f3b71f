"""Whom a load reads from: of those that are ready, those that can be reached, the best first."""

from __future__ import annotations

import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from engine_loader import InProcessEngine
from engine_loader.errors import SourceUnreachable, VersionUnavailable
from engine_loader.sources.chain import chain_length
from engine_loader.sources.groups import Found, Group
from engine_loader.sources.search import Search
from engine_registry import (
    InstanceState,
    InstanceStatus,
    Location,
    Manifest,
    ModelIdentity,
    Place,
    RankRecord,
    RankState,
    Registry,
)
from engine_registry.errors import EtcdRefused, InvalidField
from engine_registry.holders.query import HolderQuery
from engine_registry.pulls.taking import take_ticket
from engine_registry.schema.keyvalue import Found as FoundKeys
from engine_registry.schema.keyvalue import Range
from engine_registry.watching.waiting import Wanted
from tests.support.builders import a_record
from tests.support.fake_etcd import FakeEtcd
from tests.support.shelf import OverFake, shelve


class Ready:
    """A registry in which these instances are ready."""

    def __init__(
        self, *instances: Sequence[RankRecord], pulls: dict[str, int] | None = None
    ) -> None:
        self._instances = instances
        self._pulls = pulls or {}

    def ready(
        self, wanted: object, timeout_s: float, cancel: None, **_: object
    ) -> list[InstanceStatus]:
        return [
            InstanceStatus(records[0].instance, InstanceState.READY, tuple(records))
            for records in self._instances
        ]

    def count_pulls(self, records: Sequence[RankRecord]) -> dict[str, int]:
        return {one.incarnation: self._pulls.get(one.instance, 0) for one in records}


def one(instance: str, **changes: Any) -> RankRecord:
    """The only rank of an instance, in this process's reach."""
    defaults = {
        "protocol": "in_process",
        "fabric": "",
        "topology": {},
        "world_size": 1,
        "rank": 0,
        "incarnation": instance * 32,
    }
    return a_record(instance=instance, **{**defaults, **changes})


def search(
    registry: Ready,
    rank: int | None,
    engine: InProcessEngine,
    boxes: bool = True,
    wanted: Wanted = ("any",),
    avoid: Collection[str] = (),
    me: RankRecord | None = None,
    **options: Any,
) -> Found:
    place = Place(rank) if rank is not None else None
    found = Search(
        cast(Registry, registry), engine, wanted, place, Manifest((), ()), boxes, **options
    )
    return found.find(time.monotonic(), avoid, me)


def records_of(groups: Sequence[Group]) -> list[RankRecord]:
    """The first of each team, group by group."""
    return [team[0] for group in groups for team in group.teams]


def find(
    registry: Ready, rank: int = 0, engine: InProcessEngine | None = None, **options: Any
) -> list[str]:
    found = search(registry, rank, engine or InProcessEngine(), **options)
    return [f"{record.instance}/{record.rank}" for record in records_of(found.alike)]


def test_the_one_with_the_fewest_readers_comes_first() -> None:
    registry = Ready([one("a")], [one("b")], [one("c")], pulls={"a": 2, "b": 0, "c": 1})
    assert find(registry) == ["b/0", "c/0", "a/0"]


@pytest.mark.parametrize("boxes", [False, True])
def test_the_readers_of_many_are_read_at_once_and_order_them_alike(boxes: bool) -> None:
    names = [f"i{number}" for number in range(8)]
    registry = Ready(
        *[[one(name, incarnation=f"{number:032x}")] for number, name in enumerate(names)],
        pulls={name: 7 - number for number, name in enumerate(names)},
    )
    found = search(registry, 0, InProcessEngine(), boxes)
    best_first = list(reversed(names))
    assert [record.instance for record in records_of(found.alike)] == best_first
    assert [record.instance for record in records_of(found.instances)] == best_first * boxes


def test_of_equally_busy_ones_this_host_comes_first_and_then_the_same_fabric() -> None:
    here = one("c", host=socket.gethostname())
    registry = Ready([one("a", host="far")], [one("b", host="far", fabric="rack")], [here])
    assert find(registry, engine=InProcessEngine(fabric="rack")) == ["c/0", "b/0", "a/0"]


@pytest.mark.parametrize(
    ("near", "far"),
    [
        # the subnet, whatever the cards are called
        ({"mlx5_3": "10.1.0.0/24"}, {"mlx5_0": "10.1.4.0/24"}),
        # the name, where one subnet has all of them or nothing is known of subnets
        ({"mlx5_0": "10.1.0.0/24"}, {"mlx5_3": "10.1.0.0/24"}),
        ({"mlx5_0": ""}, {"mlx5_3": ""}),
        # one of several
        ({"mlx5_5": "", "mlx5_0": "10.1.0.0/24"}, {"mlx5_5": "", "mlx5_6": "10.1.0.0/24"}),
        ({"mlx5_0": ""}, {}),
    ],
)
@pytest.mark.parametrize("ours", [{"mlx5_0": "10.1.0.0/24"}])
def test_of_equally_busy_ones_a_source_on_our_rail_comes_first(
    near: dict[str, str], far: dict[str, str], ours: dict[str, str]
) -> None:
    class OnRails(InProcessEngine):
        rails = ours

    for order in ((near, far), (far, near)):
        registry = Ready(*[[one("near" if r is near else "far", rails=r)] for r in order])
        for engine in (OnRails() for _ in range(8)):  # each has another order of equal ones
            assert find(registry, engine=engine) == ["near/0", "far/0"]


def test_a_rail_never_keeps_a_source_out_and_counts_less_than_readers_and_fabric() -> None:
    class OnRails(InProcessEngine):
        rails = {"mlx5_0": "10.1.0.0/24"}  # noqa: RUF012  nothing changes it

    ours = {"mlx5_0": "10.1.0.0/24"}
    busy = Ready([one("a", rails=ours)], [one("b", rails={"x": "y"})], pulls={"a": 1})
    assert find(busy, engine=OnRails()) == ["b/0", "a/0"]
    fabric = Ready([one("a", rails=ours)], [one("b", fabric="rack")])
    assert find(fabric, engine=OnRails(fabric="rack")) == ["b/0", "a/0"]


def test_of_equal_ones_each_loader_has_an_order_of_its_own_and_keeps_it() -> None:
    registry = Ready([one("a")], [one("b")], [one("c")])
    engines = [InProcessEngine() for _ in range(40)]
    first = [find(registry, engine=engine) for engine in engines]
    assert {order[0] for order in first} == {"a/0", "b/0", "c/0"}
    assert first == [find(registry, engine=engine) for engine in engines]


def test_only_the_newest_version_is_read_unless_another_is_named() -> None:
    registry = Ready([one("a", version=3)], [one("b", version=4)], [one("c", version=4)])
    assert sorted(find(registry)) == ["b/0", "c/0"]
    assert find(registry, version=3) == ["a/0"]
    with pytest.raises(VersionUnavailable, match="version 5 is not served: a, b, c has 3, 4"):
        find(registry, version=5)


def test_instances_of_another_model_than_the_first_are_not_mixed_in() -> None:
    other = ModelIdentity("other")
    assert find(Ready([one("a", model=other)], [one("b")], [one("c", model=other)])) in (
        ["a/0", "c/0"],
        ["c/0", "a/0"],
    )


def test_what_cannot_be_reached_is_never_chosen_and_all_of_it_is_reported() -> None:
    unreachable = [one("a", protocol="rdma")], [one("b", fabric="island")]
    engine = InProcessEngine(fabric="mainland")
    assert find(Ready(*unreachable, [one("c")]), engine=engine) == ["c/0"]
    with pytest.raises(SourceUnreachable) as caught:
        find(Ready(*unreachable), engine=engine)
    assert "/engines/a/0 is served over rdma, this engine speaks in_process" in str(caught.value)
    assert "/engines/b/0 is on the fabric 'island', this engine on 'mainland'" in str(caught.value)


@pytest.mark.parametrize(
    ("ours", "theirs", "obstacle"),
    [
        (
            "10.0.0.1:1",
            "[fd00::2]:1",
            "is served over IPv6, this engine speaks IPv4: use a `host` of IPv6",
        ),
        (
            "[::1]:1",
            "127.0.0.1:1",
            "is served over IPv4, this engine speaks IPv6: use a `host` of IPv4",
        ),
        ("10.0.0.1:1", "10.0.0.2:1", ""),
        ("[fd00::1]:1", "[fd00::2]:1", ""),
        ("10.0.0.1:1", "node-7:1", ""),
        ("node-1:1", "[::1]:1", ""),
    ],
)
def test_engines_of_one_family_do_not_read_from_those_of_the_other(
    ours: str, theirs: str, obstacle: str
) -> None:
    class Tcp(InProcessEngine):
        protocol = "tcp"
        session_id = ours

    registry = Ready([one("a", protocol="tcp", session_id=theirs)])
    if not obstacle:
        assert find(registry, engine=Tcp()) == ["a/0"]
        return
    with pytest.raises(SourceUnreachable) as caught:
        find(registry, engine=Tcp())
    assert f"/engines/a/0 {obstacle}" in str(caught.value)


def test_nvlink_within_a_host_is_out_of_reach_from_another() -> None:
    class Nvlink(InProcessEngine):
        protocol = "nvlink_intra"

    near, far = (
        one("a", protocol="nvlink_intra", host=socket.gethostname()),
        one("b", protocol="nvlink_intra", host="far"),
    )
    assert find(Ready([near], [far]), engine=Nvlink()) == ["a/0"]


def test_those_to_avoid_are_left_out_even_if_none_is_left() -> None:
    registry = Ready([one("a")], [one("b")])
    assert find(registry, avoid={"a" * 32}) == ["b/0"]
    assert find(registry, avoid={"a" * 32, "b" * 32}) == []


def test_a_rank_that_no_instance_has_is_reported_with_those_there_are() -> None:
    with pytest.raises(InvalidField, match="there is no rank 1: 'a' has the ranks 0 to 0"):
        find(Ready([one("a")]), rank=1, boxes=False)
    assert find(
        Ready([one("a")], [one("b", rank=0, world_size=2), one("b", rank=1, world_size=2)]), rank=1
    ) == ["b/1"]


def test_replicas_along_dp_in_the_same_instance_count_and_no_other_ranks() -> None:
    ranks = [
        one(
            "a",
            rank=rank,
            world_size=4,
            topology={"tp": (rank % 2, 2), "dp": (rank // 2, 2)},
            incarnation=f"{rank:032}",
        )
        for rank in range(4)
    ]
    assert sorted(find(Ready(ranks), rank=0)) == ["a/0", "a/2"]
    assert sorted(find(Ready(ranks), rank=3)) == ["a/1", "a/3"]
    assert find(Ready(ranks), rank=3, boxes=False) == ["a/3"]
    pipeline = [
        one("a", rank=rank, world_size=2, topology={"pp": (rank, 2)}, incarnation=f"{rank:032}")
        for rank in range(2)
    ]
    assert find(Ready(pipeline), rank=0) == ["a/0"]


def shards_of(instance: str, *fabrics: str, **changes: Any) -> list[RankRecord]:
    """All ranks of an instance, each on a fabric."""
    return [
        one(
            instance,
            rank=rank,
            world_size=len(fabrics),
            fabric=fabric,
            incarnation=f"{instance}{rank:031}",
            **changes,
        )
        for rank, fabric in enumerate(fabrics)
    ]


def instances(registry: Ready, rank: int | None = None, **options: Any) -> list[str]:
    found = search(registry, rank, InProcessEngine(fabric="here"), **options)
    assert all(len(team) == team[0].world_size for group in found.instances for team in group.teams)
    return [record.instance for record in records_of(found.instances)]


def test_with_boxes_all_ranks_of_an_instance_together_are_a_source_the_best_first() -> None:
    registry = Ready(shards_of("a", "", ""), shards_of("b", "here", ""), pulls={"a": 1})
    assert instances(registry) == ["b", "a"]
    assert instances(registry, rank=1) == ["b", "a"]
    assert instances(registry, rank=9) == ["b", "a"]
    assert instances(registry, rank=1, boxes=False) == []


def test_an_instance_of_which_a_rank_is_out_of_reach_or_to_be_avoided_is_none() -> None:
    registry = Ready(shards_of("a", "", "there"), shards_of("b", "", ""))
    assert instances(registry) == ["b"]
    assert instances(registry, avoid={registry._instances[1][0].incarnation}) == []


def test_that_no_instance_can_be_reached_as_a_whole_names_the_ranks_in_the_way() -> None:
    registry = Ready(shards_of("a", "", "there"))
    with pytest.raises(SourceUnreachable) as caught:
        instances(registry)
    assert caught.value.details["sources"] == ["/engines/a/1"]
    assert instances(registry, rank=0) == []  # there is one that may hold the same


def test_a_rank_that_only_an_older_version_has_is_reported_with_those_of_the_newest() -> None:
    registry = Ready(shards_of("a", "", "", version=3), shards_of("b", "", version=4))
    with pytest.raises(InvalidField, match="there is no rank 1: 'b' has the ranks 0 to 0"):
        find(registry, rank=1, boxes=False)
    assert find(registry, rank=1, boxes=False, version=3) == ["a/1"]


# -- near ones
# --------------------------------------------------------------------------------------------------

HERE = InProcessEngine(location="b/r1/n1")


def at(instance: str, location: str, **changes: Any) -> RankRecord:
    return one(instance, location=Location.parse(location), **changes)


NODE, RACK, ZONE = at("n", "b/r1/n1"), at("r", "b/r1/n2"), at("z", "b/r2/n3")
UNKNOWN, FAR = one("u"), at("f", "a/r1/n1")


def test_of_equally_busy_ones_the_node_comes_first_then_the_rack_the_zone_and_the_rest() -> None:
    order = find(Ready([FAR], [ZONE], [RACK], [UNKNOWN], [NODE]), engine=HERE)
    assert order[:3] == ["n/0", "r/0", "z/0"]
    assert sorted(order[3:]) == ["f/0", "u/0"]


def test_within_the_zone_a_free_source_counts_for_more_than_a_near_one_and_elsewhere_never() -> (
    None
):
    registry = Ready([FAR], [ZONE], [RACK], [NODE], pulls={"n": 1, "r": 1, "z": 0})
    assert find(registry, engine=HERE) == ["z/0", "n/0", "r/0", "f/0"]
    busy = Ready([FAR], [UNKNOWN], [ZONE], pulls={"z": 90})
    assert find(busy, engine=HERE)[0] == "z/0"


@pytest.mark.parametrize(
    ("some", "at_once"),
    [([NODE, ZONE, FAR], 2), ([NODE], 1), ([FAR, UNKNOWN], 2), ([FAR, UNKNOWN, ZONE], 1)],
)
def test_no_source_of_another_zone_is_read_from_beside_one_of_ours(
    some: list[RankRecord], at_once: int
) -> None:
    (group,) = search(Ready(*[[record] for record in some]), 0, HERE).alike
    assert group.at_once == at_once
    (together,) = search(Ready(*[[record] for record in some]), None, HERE).instances
    assert together.at_once == at_once


def test_of_instances_the_one_with_the_most_ranks_in_our_zone_comes_first() -> None:
    def parts(instance: str, *locations: str) -> list[RankRecord]:
        size = len(locations)
        return [
            at(instance, where, rank=rank, world_size=size, incarnation=f"{instance}{rank:031}")
            for rank, where in enumerate(locations)
        ]

    registry = Ready(parts("x", "a", "a"), parts("y", "b", "a"), parts("z", "b", "b"))
    found = search(registry, None, HERE)
    assert [record.instance for record in records_of(found.instances)] == ["z", "y", "x"]


def test_who_does_not_know_its_zone_reads_as_if_there_were_none() -> None:
    engine = InProcessEngine()
    registry = Ready([FAR], [ZONE], [UNKNOWN], pulls={"f": 0, "z": 2, "u": 1})
    assert find(registry, engine=engine) == ["f/0", "u/0", "z/0"]


def test_of_a_model_those_of_our_zone_are_found_however_many_there_are_elsewhere() -> None:
    far = [
        at(f"f{number}", "a", incarnation=f"{number:032x}", model=MODEL) for number in range(200)
    ]
    near = at("near", "b", model=MODEL)
    some, _ = standing(*far, near)
    found = search(cast(Ready, some), 0, HERE, **BY_RANK)
    assert [record.instance for record in records_of(found.alike)] == ["near"]
    found = search(cast(Ready, some), None, HERE, wanted=MODEL)
    assert [record.instance for record in records_of(found.instances)] == ["near"]


def test_a_near_one_that_loads_costs_less_than_a_free_one_and_more_once_it_has_a_reader() -> None:
    free = [
        at(f"free{number}", "b/r2", model=MODEL, incarnation=f"{number:032x}") for number in (1, 2)
    ]
    near = loading("near", 1, location=HERE.location, model=MODEL, incarnation="b" * 32)
    some, (*_, near) = standing(*free, near)

    def best() -> tuple[str, int]:
        group = search(cast(Ready, some), 0, HERE, **BY_RANK).alike[0]
        return group.teams[0][0].instance, group.at_once

    assert best() == ("near", 1)
    ticket = take_ticket(some._etcd, near)
    assert ticket is not None
    with ticket:
        assert best() in (("free1", 2), ("free2", 2))


def test_a_chain_leaves_a_zone_once() -> None:
    """Ranks of two zones join in turn; only one zone has a source."""
    etcd = FakeEtcd()
    registry = cast(Ready, OverFake(etcd))
    source = shelve(etcd, at("s", "a", model=MODEL, host="x"))
    where = {source.instance: "a"}
    crossings = []
    tickets = []
    for number in range(24):
        name, zone = f"j{number}", "ab"[number % 2]
        me = loading(name, 0, location=Location(zone), model=MODEL, incarnation=f"{number:032x}")
        me = shelve(etcd, me)
        where[name] = zone
        found = search(registry, 0, InProcessEngine(location=zone), me=me, **BY_RANK)
        ((parent,), *_) = found.alike[0].teams
        tickets.append(take_ticket(etcd, parent, me, found.alike[0].free_since))
        if where[parent.instance] != zone:
            crossings.append(name)
    assert all(tickets)
    assert crossings == ["j1"]
    for ticket in tickets:
        if ticket is not None:
            ticket.close()


# -- rank by rank, and ranks that are loading
# ------------------------------------------------------------------------------------

MODEL = one("a").model


def standing(*records: RankRecord, indexed: bool = True) -> tuple[OverFake, list[RankRecord]]:
    """A registry in which these ranks are there, and what it says of them."""
    etcd = FakeEtcd()
    stored = [shelve(etcd, record, indexed=indexed) for record in records]
    return OverFake(etcd), stored


def loading(instance: str, order: int, **changes: Any) -> RankRecord:
    return one(instance, state=RankState.LOADING, order=order, **changes)


BY_RANK: dict[str, Any] = {
    "by_rank": True,
    "pipelined": True,
    "hop": 0.01,
    "boxes": False,
    "wanted": MODEL,
}


def by_rank(registry: OverFake, me: RankRecord | None = None, **options: Any) -> list[str]:
    found = search(cast(Ready, registry), 0, InProcessEngine(), me=me, **{**BY_RANK, **options})
    (group,) = found.alike
    names = [record.instance for (record,) in group.teams]
    return [*names[: group.at_once], *(["…"] if len(names) > group.at_once else [])]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_rank_will_do_whatever_else_of_its_instance_there_is(indexed: bool) -> None:
    first, second = one("a", world_size=2), one("b", world_size=2)
    assert by_rank(standing(first, indexed=indexed)[0]) == ["a"]
    both, _ = standing(first, second, indexed=indexed)
    assert by_rank(both) in (["a", "b"], ["b", "a"])


def test_the_version_of_a_complete_instance_counts_for_more_than_a_newer_one_of_a_rank_alone() -> (
    None
):
    some, _ = standing(one("a", version=3), one("b", version=4, world_size=2))
    assert by_rank(some) == ["a"]
    assert by_rank(some, version=4) == ["b"]
    parts, _ = standing(one("b", version=4, world_size=2), one("c", version=3, world_size=2))
    assert by_rank(parts) == ["b"]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_loading_rank_is_a_source_for_those_that_began_later_and_only_on_request(
    indexed: bool,
) -> None:
    registry, (root, first, second, _) = standing(
        one("root"), loading("a", 2), loading("b", 3), loading("c", 4, version=7), indexed=indexed
    )
    if indexed:
        assert by_rank(registry)[-1] == "…"
        assert by_rank(registry)[0] != "c"
    assert by_rank(registry, me=second) == ["a", "…"]
    assert by_rank(registry, me=first) == ["root"]
    assert by_rank(registry, pipelined=False) == ["root"]
    assert by_rank(registry, me=second, avoid=[first.incarnation]) == ["root"]
    none = [root.incarnation, first.incarnation]
    assert not search(cast(Ready, registry), 0, InProcessEngine(), me=second, avoid=none, **BY_RANK)


def test_many_that_begin_at_once_become_one_chain_though_none_has_a_ticket() -> None:
    registry, (_, *ranks) = standing(
        one("root"), *[loading(f"{number:02}", number + 2) for number in range(30)]
    )
    assert by_rank(registry, me=ranks[0]) == ["root"]
    assert [by_rank(registry, me=rank) for rank in ranks[1:]] == [
        [f"{number:02}", "…"] for number in range(29)
    ]


def test_the_source_holds_as_long_as_nobody_else_has_begun_to_read_from_it() -> None:
    registry, (root, first) = standing(one("root"), loading("a", 2))
    found = search(cast(Ready, registry), 0, InProcessEngine(), **BY_RANK)
    (group,) = found.alike
    assert group.free_since is not None
    for record in (root, first):
        ticket = registry.pull(record, None, group.free_since)
        assert ticket is not None
        ticket.close()
    complete = search(
        cast(Ready, registry), 0, InProcessEngine(), **{**BY_RANK, "pipelined": False}
    )
    assert complete.alike[0].free_since is None


def test_among_those_that_were_seen_just_now_it_is_chosen_anew_and_nobody_is_asked() -> None:
    registry, (_, *some) = standing(one("seed"), *(loading(f"b{at}", at) for at in range(1, 4)))
    me = some[-1]
    looked = registry.find_holders(
        HolderQuery(me.model, Place(0), loading=True, me=me, chain=chain_length(0.01))
    )
    seen = replace(looked, readers={some[1].incarnation: 1}, revision=99)
    nobody = cast(Registry, object())
    again = Search(
        nobody,
        InProcessEngine(),
        me.model,
        Place(0),
        Manifest((), ()),
        False,
        by_rank=True,
        hop=0.01,
    ).find(time.monotonic(), me=me, seen=seen)
    (group,) = again.alike
    assert [team[0].instance for team in group.teams][-1] == "b2"
    assert group.free_since == 99
    assert again.holders is seen


def test_complete_ranks_without_a_reader_are_read_at_once_where_others_are_loading() -> None:
    registry, (*_, me) = standing(one("x"), one("y"), one("z"), loading("a", 2), loading("b", 3))
    assert sorted(by_rank(registry, me=me)[:3]) == ["x", "y", "z"]
    assert by_rank(registry, me=me, max_sources=1)[1:] == ["…"]


def test_a_user_that_may_not_see_the_tickets_reads_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry, (_, _, me) = standing(one("root"), loading("a", 2), loading("b", 3))
    etcd = registry._etcd
    read = etcd.read

    def refuse(ranges: Sequence[Range]) -> tuple[int, list[FoundKeys]]:
        if any(wanted.key.startswith("/pulls/") for wanted in ranges):
            raise EtcdRefused("permission denied", reason="denied")
        return read(ranges)

    monkeypatch.setattr(etcd, "read", refuse)
    assert by_rank(registry, me=me) == ["a", "…"]
    assert by_rank(registry, pipelined=False) == ["root"]


def test_replicas_in_our_own_instance_that_load_are_sources_too() -> None:
    def rank(number: int) -> RankRecord:
        return loading(
            "mine",
            5 + number,
            rank=number,
            world_size=3,
            incarnation=f"{number}" * 32,
            topology={"dp": (number, 3), "tp": (0, 1)},
        )

    registry, (_, first, second, third) = standing(one("root"), rank(0), rank(1), rank(2))
    for me, wanted in ((second, first), (third, second)):
        place = Place(me.rank, 3, me.topology)
        found = Search(
            registry,
            InProcessEngine(),
            place=place,
            dst=Manifest((), ()),
            **{**BY_RANK, "boxes": True},
        ).find(time.monotonic(), me=me)
        assert found.alike[0].teams[0][0].key == wanted.key


# -- contents and places
# --------------------------------------------------------------------------------------------------

A, B = "a" * 32, "b" * 32


def groups(*records: RankRecord, content: str = "", **options: Any) -> dict[str, list[str]]:
    registry, _ = standing(*records)
    given = {**BY_RANK, **options}
    place = given.pop("place", Place(0))
    search = Search(registry, InProcessEngine(), place=place, dst=Manifest((), ()), **given)
    found = search.find(time.monotonic(), content=content)
    return {
        group.content: sorted(record.instance for (record,) in group.teams) for group in found.alike
    }


def test_ranks_of_one_version_whose_contents_differ_are_never_in_one_group() -> None:
    records = one("a", content=A), one("b", content=B), one("c", content=A)
    assert groups(*records) == {A: ["a", "c"], B: ["b"]}
    loading_ones = loading("d", 2, content=A), loading("e", 3, content=B)
    assert groups(*records, *loading_ones) == {A: ["a", "c", "d"], B: ["b", "e"]}


@pytest.mark.parametrize("content", [A, B])
def test_the_content_of_which_something_has_come_comes_first(content: str) -> None:
    records = one("a", content=A), one("b", content=B)
    assert next(iter(groups(*records, content=content))) == content
    assert next(iter(groups(*records, loading("c", 2, content=A), content=content))) == content


def test_one_that_is_loading_is_expected_to_choose_a_source_of_its_own_content() -> None:
    """Else the one of another content would count as read by it, and another would be preferred."""
    root_a, root_b = one("x", content=A), one("y", content=B)
    found = groups(root_a, root_b, loading("c", 2, content=B))
    assert found == {A: ["x"], B: ["c", "y"]}
    assert next(iter(found)) == A  # whose only source has no reader


def test_instances_are_one_group_where_all_their_ranks_agree_by_rank() -> None:
    def instance(name: str, *contents: str) -> list[RankRecord]:
        return [
            one(name, rank=rank, world_size=2, content=content, incarnation=f"{name}{rank:031}")
            for rank, content in enumerate(contents)
        ]

    registry = Ready(instance("a", A, B), instance("b", A, B), instance("c", B, A))
    found = search(registry, None, InProcessEngine())
    assert sorted(
        sorted(team[0].instance for team in group.teams) for group in found.instances
    ) == [["a", "b"], ["c"]]
    only = search(registry, None, InProcessEngine(), contents=[B, A])
    assert [team[0].instance for group in only.instances for team in group.teams] == ["c"]
    assert {group.content for group in only.instances} < {
        group.content for group in found.instances
    }


def test_contents_that_nobody_has_any_more_are_not_available() -> None:
    with pytest.raises(
        VersionUnavailable, match="not served any more: a has been updated or started again since"
    ):
        search(Ready([one("a", content=A)]), 0, InProcessEngine(), contents=[B])
    with pytest.raises(VersionUnavailable):
        groups(one("a", content=A), contents=[B])
    assert groups(one("a", content=A), one("b", content=B), contents=[B]) == {B: ["b"]}


def test_a_replica_has_to_have_the_content_of_the_rank_that_it_stands_for() -> None:
    def rank(number: int, content: str) -> RankRecord:
        place = {"rank": number, "world_size": 3, "topology": {"dp": (number, 3)}}
        return one("a", content=content, incarnation=f"{number}" * 32, **place)

    registry = Ready([rank(0, A), rank(1, A), rank(2, B)])
    assert sorted(find(registry, 0, contents=[A, B, B])) == ["a/0", "a/1"]


EP = [one("a", topology={"ep": (0, 2)}), one("b", topology={"ep": (1, 2)})]


def test_without_boxes_only_ranks_at_the_same_place_will_do() -> None:
    for index, name in enumerate("ab"):
        assert list(groups(*EP, place=Place(0, 1, {"ep": (index, 2)})).values()) == [[name]]
    with pytest.raises(InvalidField, match=r"there is no rank 0 of 1, ep 2/4"):
        groups(*EP, place=Place(0, 1, {"ep": (2, 4)}))
    # which states none
    assert list(groups(one("a"), place=Place(0, 1, {"ep": (1, 2)})).values()) == [["a"]]
    with pytest.raises(InvalidField, match="there is no rank 0 of 2"):
        groups(one("a"), place=Place(0, 2))


def test_a_rank_that_may_be_several_is_refused_unless_the_place_or_boxes_say_which() -> None:
    with pytest.raises(
        InvalidField, match=r"not clear: /engines/a/0 is rank 0 of 1, ep 0/2, /engines/b/0 is"
    ):
        groups(*EP)
    assert list(groups(*EP, boxes=True).values()) == [["a", "b"]]
    with pytest.raises(InvalidField, match="say world_size and topology"):
        groups(one("a"), one("b", world_size=2))
