"""Who holds the weights of a model: a few of any number of ranks, in a few requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from engine_registry import Location, ModelIdentity, Place, RankRecord, RankState
from engine_registry.errors import EtcdFull, EtcdRefused, InstanceIncomplete, InstanceNotFound
from engine_registry.holders.index import SAMPLE
from engine_registry.holders.look import (
    MAX_INSTANCES,
    find_updating,
    look,
    look_anywhere,
    look_for_instances,
)
from engine_registry.holders.query import HolderQuery, everything
from engine_registry.holders.waiting import wait_for_holders, wait_for_instances
from engine_registry.pulls.taking import take_ticket
from engine_registry.schema.holder import holder_key
from engine_registry.schema.keyvalue import Found, Put, Range
from engine_registry.schema.record import GATEWAY, Retained
from engine_registry.telemetry import metrics
from tests.support.builders import a_record
from tests.support.shelf import CountingEtcd, shelve

MODEL = ModelIdentity("qwen", "r1")
PLACE = Place(0)


def one(number: int, **changes: Any) -> RankRecord:
    """The only rank of an instance."""
    given = {
        "instance": f"i{number:05}",
        "incarnation": f"{(number * 0x9E3779B97F4A7C15) % (1 << 128):032x}"[::-1],
        "world_size": 1,
        "topology": {},
        "model": MODEL,
        "version": 0,
    }
    return a_record(**{**given, **changes})


def loading(number: int, **changes: Any) -> RankRecord:
    return one(number, state=RankState.LOADING, **changes)


@pytest.fixture
def etcd() -> CountingEtcd:
    return CountingEtcd()


def names(records: tuple[RankRecord, ...]) -> list[str]:
    return [record.instance for record in records]


# -- ranks that have all
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [0, 1, SAMPLE, SAMPLE + 1, 400])
def test_of_any_number_a_few_are_read_in_a_few_requests(etcd: CountingEtcd, there: int) -> None:
    for number in range(there):
        shelve(etcd, one(number))
        shelve(etcd, one(number, instance=f"other-{number}", model=ModelIdentity("other")))
    found = look(etcd, HolderQuery(MODEL, PLACE))
    assert len(found.ready) == min(there, SAMPLE)
    assert found.all_ready == (there <= SAMPLE)
    assert not found.scanned
    assert etcd.requests <= 3
    assert etcd.nbytes < SAMPLE * 2_000


def test_whoever_looks_again_and_again_sees_all_of_them(etcd: CountingEtcd) -> None:
    for number in range(5 * SAMPLE):
        shelve(etcd, one(number))
    seen = {name for _ in range(400) for name in names(look(etcd, HolderQuery(MODEL, PLACE)).ready)}
    assert len(seen) == 5 * SAMPLE


def test_the_newest_version_comes_first_and_another_where_it_is_named(etcd: CountingEtcd) -> None:
    for number in range(3 * SAMPLE):
        shelve(etcd, one(number, version=number % 3))
    ask = HolderQuery(MODEL, PLACE)
    assert {record.version for record in look(etcd, ask).ready} == {2}
    assert {record.version for record in look(etcd, replace(ask, version=1)).ready} == {1}
    # what is served instead, for a message
    assert look(etcd, replace(ask, version=9)).ready


def test_where_the_sample_does_not_do_all_are_read_until_one_does(etcd: CountingEtcd) -> None:
    for number in range(300):
        shelve(etcd, one(number, protocol="rdma" if number == 123 else "tcp"))
    ask = HolderQuery(MODEL, PLACE, lambda record: record.protocol == "rdma")
    assert names(look(etcd, ask).ready) == ["i00123"]
    nobody = look(etcd, HolderQuery(MODEL, PLACE, lambda _: False))
    assert nobody.ready  # so that a message can say who there is
    assert not nobody.scanned


def test_an_older_version_is_read_as_well_where_only_that_will_do(etcd: CountingEtcd) -> None:
    """However few have the newest, and however many have the older ones."""
    for number in range(60):
        shelve(etcd, one(number, version=9 if number < 3 else 8, protocol="tcp"))
    shelve(etcd, one(99, version=8, protocol="rdma"))
    shelve(etcd, one(98, version=7, protocol="rdma"))
    ask = HolderQuery(MODEL, PLACE, lambda record: record.protocol == "rdma")
    assert set(names(look(etcd, ask).ready)) == {"i00098", "i00099"}
    wanted = look_for_instances(etcd, MODEL, lambda one: one.records[0].protocol == "rdma")
    assert [status.instance for status in wanted] == ["i00099", "i00098"]


def test_where_nobody_will_do_somebody_is_named_though_the_last_page_is_of_others(
    etcd: CountingEtcd,
) -> None:
    for number in range(200):
        shelve(etcd, one(number, version=2 if number < 40 else 1, world_size=1 + number // 40))
    found = look(etcd, HolderQuery(MODEL, Place(0, 1), lambda _: False))
    assert found.ready
    assert {record.world_size for record in found.ready} == {1}


def test_only_ranks_at_the_place_fit(etcd: CountingEtcd) -> None:
    shelve(etcd, one(1, world_size=2))
    shelve(etcd, one(2, world_size=4, topology={"tp": (0, 4)}))
    shelve(etcd, one(3, rank=1, world_size=2))
    assert names(look(etcd, HolderQuery(MODEL, Place(0, 2))).ready) == ["i00001"]
    assert names(look(etcd, HolderQuery(MODEL, Place(0, 4, {"tp": (0, 4)}))).ready) == ["i00002"]
    assert names(look(etcd, HolderQuery(MODEL, Place(1))).ready) == ["i00003"]


STALE: dict[str, Callable[[CountingEtcd, RankRecord], object]] = {
    "deleted": lambda etcd, record: etcd.delete(record.key),
    "damaged": lambda etcd, record: etcd.put(record.key, b"{"),
    "replaced": lambda etcd, record: shelve(etcd, replace(record, incarnation="f" * 32)),
    "ended": lambda etcd, record: shelve(etcd, replace(record, ended="withdrawn")),
    "of another model": lambda etcd, record: etcd.put(
        holder_key(replace(record, model=ModelIdentity("other"))), record.key.encode()
    ),
}


@pytest.mark.parametrize("change", list(STALE))
def test_an_entry_counts_only_as_far_as_the_record_says_the_same(
    etcd: CountingEtcd, change: str
) -> None:
    record = shelve(etcd, one(1))
    STALE[change](etcd, record)
    asked = ModelIdentity("other") if change == "of another model" else MODEL
    incarnations = [found.incarnation for found in look(etcd, HolderQuery(asked, PLACE)).ready]
    assert record.incarnation not in incarnations
    assert incarnations == (["f" * 32] if change == "replaced" else [])


def test_the_readers_of_each_are_counted_at_the_revision_that_is_said(etcd: CountingEtcd) -> None:
    first, second = shelve(etcd, one(1)), shelve(etcd, one(2))
    tickets = [take_ticket(etcd, first), take_ticket(etcd, first)]
    found = look(etcd, HolderQuery(MODEL, PLACE))
    assert found.readers == {first.incarnation: 2, second.incarnation: 0}
    late = take_ticket(etcd, second, free_since=found.revision)
    assert take_ticket(etcd, second, free_since=found.revision) is None
    again = take_ticket(etcd, second, free_since=look(etcd, HolderQuery(MODEL, PLACE)).revision)
    for ticket in [*tickets, late, again]:
        assert ticket is not None
        ticket.close()


# -- ranks that load
# --------------------------------------------------------------------------------------------------


def test_those_just_before_come_and_none_that_began_later(etcd: CountingEtcd) -> None:
    shelve(etcd, one(0))
    ranks = [shelve(etcd, loading(number)) for number in range(1, 21)]
    ask = HolderQuery(MODEL, PLACE, loading=True, chain=33)
    for at in (0, 1, 5, 19):
        found = look(etcd, replace(ask, me=ranks[at]))
        before = [record.instance for record in reversed(ranks[:at])]
        assert names(found.loading) == before[:SAMPLE]
        assert found.ahead == at
    assert names(look(etcd, ask).loading) == [f"i{20 - number:05}" for number in range(SAMPLE)]
    assert look(etcd, replace(ask, loading=False)).loading == ()


def test_where_more_load_than_make_a_chain_they_come_from_anywhere_before(
    etcd: CountingEtcd,
) -> None:
    shelve(etcd, one(0))
    ranks = [shelve(etcd, loading(number)) for number in range(1, 201)]
    me = ranks[150]
    ask = HolderQuery(MODEL, PLACE, loading=True, chain=33, me=me)
    seen: set[str] = set()
    for _ in range(200):
        found = look(etcd, ask)
        assert found.ahead == 150
        assert 0 < len(found.loading) <= SAMPLE
        assert all(record.began < me.began for record in found.loading)
        seen.update(names(found.loading))
    assert len(seen) > 120  # of 150


def test_of_ranks_that_began_at_once_none_finds_itself_nor_one_that_finds_it(
    etcd: CountingEtcd,
) -> None:
    shelve(etcd, one(0))
    ranks = [shelve(etcd, loading(number, order=7)) for number in range(1, 41)]
    for me in ranks:
        ask = HolderQuery(MODEL, PLACE, loading=True, me=me)
        found = [record for _ in range(5) for record in look(etcd, ask).loading]
        assert all(record.began < me.began for record in found)
        assert found or me.began == min(record.began for record in ranks)


def test_a_rank_keeps_its_place_and_reads_only_its_version(etcd: CountingEtcd) -> None:
    shelve(etcd, one(0, version=4))
    first = shelve(etcd, loading(1, version=4))
    shelve(etcd, loading(2, version=3))
    me = shelve(etcd, loading(3, version=4))
    assert names(look(etcd, HolderQuery(MODEL, PLACE, loading=True, me=me, chain=33)).loading) == [
        "i00001"
    ]
    shelve(etcd, replace(first, order=first.order))  # its record was put again
    assert names(look(etcd, HolderQuery(MODEL, PLACE, loading=True, me=me, chain=33)).loading) == [
        "i00001"
    ]


def test_a_rank_that_is_not_in_the_index_reads_from_complete_ones_only(etcd: CountingEtcd) -> None:
    """Else it might read from one that reads from it, or from itself."""
    shelve(etcd, one(0))
    for number in range(1, 4):
        shelve(etcd, loading(number))
    me = shelve(etcd, loading(4), indexed=False)
    found = look(etcd, HolderQuery(MODEL, PLACE, loading=True, me=me))
    assert names(found.ready) == ["i00000"]
    assert found.loading == ()


# -- instances
# --------------------------------------------------------------------------------------------------


def shelve_instance(etcd: CountingEtcd, number: int, world_size: int, **changes: Any) -> None:
    for rank in range(world_size):
        shelve(etcd, one(number, rank=rank, world_size=world_size, **changes))


def test_of_the_instances_a_few_that_are_ready_are_read(etcd: CountingEtcd) -> None:
    for number in range(30):
        shelve_instance(etcd, number, 2)
    shelve(etcd, one(99, world_size=2))  # its rank 1 is missing
    found = look_for_instances(etcd, MODEL, everything)
    assert len(found) == MAX_INSTANCES
    assert all(status.records[1].rank == 1 for status in found)
    wanted = look_for_instances(etcd, MODEL, lambda status: status.instance == "i00017")
    assert [status.instance for status in wanted] == ["i00017"]


def test_where_nobody_has_the_rank_instances_say_which_there_are(etcd: CountingEtcd) -> None:
    shelve_instance(etcd, 1, 2)
    found = look_anywhere(etcd, HolderQuery(MODEL, Place(5)))
    assert found.ready == ()
    assert [status.instance for status in found.instances] == ["i00001"]
    assert found
    assert look_anywhere(etcd, HolderQuery(MODEL, Place(1))).instances == ()


def test_that_there_is_nobody_or_not_all_is_said_as_for_names(etcd: CountingEtcd) -> None:
    with pytest.raises(InstanceNotFound, match="no instance of qwen@r1 is registered"):
        wait_for_instances(etcd, MODEL, everything, None, 0.0)
    shelve(etcd, one(1, world_size=2))
    with pytest.raises(InstanceIncomplete, match=r"'i00001' is not ready.*1 of 2") as caught:
        wait_for_instances(etcd, MODEL, everything, None, 0.0)
    assert caught.value.details["missing"] == {"i00001": [1]}
    with pytest.raises(InstanceIncomplete):
        wait_for_holders(etcd, HolderQuery(MODEL, Place(1)), False, 0.0)


def test_ranks_that_are_being_changed_are_found(etcd: CountingEtcd) -> None:
    shelve(etcd, one(1, state=RankState.UPDATING))
    shelve(etcd, one(2))
    assert names(find_updating(etcd, MODEL, 0)) == ["i00001"]
    assert find_updating(etcd, MODEL, 1) == ()


# -- ranks that are not in the index
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def scans() -> Iterator[Callable[[], float | None]]:
    collectors = CollectorRegistry()
    with metrics.counting(collectors):
        yield lambda: collectors.get_sample_value("engines_registry_holder_scans_total")


def test_ranks_of_the_release_before_are_found_where_the_index_has_nobody(
    etcd: CountingEtcd, scans: Callable[[], float | None]
) -> None:
    old = shelve(etcd, one(1), indexed=False)
    shelve(etcd, loading(2), indexed=False)
    me = shelve(etcd, loading(3))
    found = look(etcd, HolderQuery(MODEL, PLACE, loading=True, me=me))
    assert found.scanned
    assert names(found.ready) == [old.instance]
    assert names(found.loading) == ["i00002"]
    assert found.ahead == 1
    assert found.readers == {record.incarnation: 0 for record in (*found.ready, *found.loading)}
    assert scans() == 1
    assert [one.instance for one in look_for_instances(etcd, MODEL, everything)] == ["i00001"]
    shelve(etcd, one(4, state=RankState.UPDATING), indexed=False)
    assert names(find_updating(etcd, MODEL, 0)) == ["i00004"]
    etcd.delete(old.key)
    with pytest.raises(InstanceIncomplete, match="'i00003' is not ready: rank 0 loading"):
        wait_for_holders(etcd, HolderQuery(MODEL, PLACE), False, 0.0)


def test_nothing_is_read_for_them_where_the_index_has_somebody_or_everybody(
    etcd: CountingEtcd, scans: Callable[[], float | None]
) -> None:
    shelve(etcd, one(1, model=ModelIdentity("other")))
    assert not look(etcd, HolderQuery(MODEL, PLACE)).scanned  # all are in the index
    shelve(etcd, one(2), indexed=False)
    shelve(etcd, one(3))
    assert names(look(etcd, HolderQuery(MODEL, PLACE)).ready) == ["i00003"]
    assert scans() == 0


def test_a_seed_of_a_gateway_is_found_as_what_it_is(etcd: CountingEtcd) -> None:
    shelve(etcd, one(1, kept_by=GATEWAY), indexed=False)
    assert look(etcd, HolderQuery(MODEL, PLACE)).ready[0].kept_by == GATEWAY


class Forbidden(CountingEtcd):
    """Lets nobody read under a prefix."""

    def __init__(self, prefix: str, error: EtcdRefused) -> None:
        super().__init__()
        self.prefix, self.error = prefix, error

    def read(self, ranges: Any) -> tuple[int, list[Found]]:
        if any(wanted.key.startswith(self.prefix) for wanted in ranges):
            raise self.error
        return super().read(ranges)


DENIED = EtcdRefused("permission denied", reason="denied")


def test_whoever_may_not_read_the_index_reads_all_records() -> None:
    etcd = Forbidden("/holders/", DENIED)
    shelve(etcd, one(1))
    assert look(etcd, HolderQuery(MODEL, PLACE)).scanned
    assert [one.instance for one in look_for_instances(etcd, MODEL, everything)] == ["i00001"]
    assert wait_for_instances(etcd, MODEL, everything, None, 0.0)
    assert find_updating(etcd, MODEL, 0) == ()
    shelve(etcd, one(1, world_size=2))
    with pytest.raises(InstanceIncomplete):
        wait_for_instances(etcd, MODEL, everything, None, 0.0)


def test_whoever_may_not_see_tickets_does_not_know_the_readers() -> None:
    etcd = Forbidden("/pulls/", DENIED)
    shelve(etcd, one(1))
    found = look(etcd, HolderQuery(MODEL, PLACE))
    assert names(found.ready) == ["i00001"]
    assert found.readers is None


def test_what_etcd_refuses_for_another_reason_is_raised() -> None:
    etcd = Forbidden("/holders/", EtcdFull("no"))
    with pytest.raises(EtcdFull):
        look(etcd, HolderQuery(MODEL, PLACE))
    with pytest.raises(EtcdFull):
        look_for_instances(etcd, MODEL, everything)
    with pytest.raises(EtcdFull):
        find_updating(etcd, MODEL, 0)
    etcd.prefix = "/pulls/"
    shelve(etcd, one(1))
    with pytest.raises(EtcdFull):
        look(etcd, HolderQuery(MODEL, PLACE))


def test_hostile_entries_lead_nowhere(etcd: CountingEtcd) -> None:
    record = shelve(etcd, one(1))
    for number, value in enumerate((b"\xff", b"/engines/../0", b"/engines/x/0", b"")):
        key = holder_key(replace(record, incarnation=f"{number:032x}"))
        etcd.commit([], [Put(key, value, 0)])
    assert names(look(etcd, HolderQuery(MODEL, PLACE)).ready) == ["i00001"]


def test_the_ranges_of_one_read_are_of_one_revision(etcd: CountingEtcd) -> None:
    shelve(etcd, one(1))
    revision, found = etcd.read([Range("/engines/", "/engines0"), Range("/engines/i00001/0")])
    assert revision == etcd.snapshot("/").revision
    assert [item.key for each in found for item in each.items] == ["/engines/i00001/0"] * 2


# -- near ones
# --------------------------------------------------------------------------------------------------

HERE = Location("b", "r1", "n1")


def near(number: int, zone: str, rack: str = "", node: str = "", **changes: Any) -> RankRecord:
    return one(number, location=Location(zone, rack, node), **changes)


@pytest.mark.parametrize("there", [1, SAMPLE, 200])
def test_of_a_zone_that_has_some_only_those_come_however_many_there_are_elsewhere(
    etcd: CountingEtcd, there: int
) -> None:
    for number in range(400):
        shelve(etcd, near(number, "a"))
    for number in range(400, 400 + there):
        shelve(etcd, near(number, "b", f"r{number % 20}", f"n{number}"))
    found = look(etcd, HolderQuery(MODEL, PLACE, near=Location("b")))
    assert len(found.ready) == min(there, SAMPLE)
    assert {record.location.zone for record in found.ready} == {"b"}
    assert found.all_ready == (there <= SAMPLE)
    assert etcd.requests <= 3
    assert etcd.nbytes < 2 * SAMPLE * 2_000


def test_those_of_the_same_node_and_rack_come_whatever_else_the_zone_has(
    etcd: CountingEtcd,
) -> None:
    for number in range(300):
        shelve(etcd, near(number, "b", f"r{number % 100}", f"n{number % 150}"))
    for _ in range(5):
        found = look(etcd, HolderQuery(MODEL, PLACE, near=HERE)).ready
        assert len(found) == SAMPLE
        assert sum(record.location.node == "n1" for record in found) >= 2
        assert sum(record.location.rack == "r1" for record in found) >= 2
        assert sum(record.location.rack != "r1" for record in found) >= 3


def test_where_the_zone_has_nobody_those_of_others_come_and_such_without_a_location(
    etcd: CountingEtcd,
) -> None:
    shelve(etcd, near(1, "a"))
    shelve(etcd, one(2))
    shelve(etcd, near(3, "", "r1"))  # of a rack of the same name, somewhere
    ask = HolderQuery(MODEL, PLACE, near=HERE)
    assert sorted(names(look(etcd, ask).ready)) == ["i00001", "i00002", "i00003"]
    shelve(etcd, near(4, "b"))
    assert names(look(etcd, ask).ready) == ["i00004"]
    not_that = replace(ask, usable=lambda record: record.instance != "i00004")
    assert sorted(names(look(etcd, not_that).ready)) == ["i00001", "i00002", "i00003"]


def test_a_node_and_a_rack_count_where_no_zone_is_known(etcd: CountingEtcd) -> None:
    for number in range(300):
        shelve(etcd, near(number, "", f"r{number % 100}"))
    found = look(etcd, HolderQuery(MODEL, PLACE, near=Location("", "r1"))).ready
    assert sum(record.location.rack == "r1" for record in found) >= 2
    assert sum(record.location.rack != "r1" for record in found) >= 3


def test_a_newer_version_elsewhere_counts_for_more_than_the_zone(etcd: CountingEtcd) -> None:
    for number in range(20):
        shelve(etcd, near(number, "b", version=3))
    shelve(etcd, near(20, "a", version=4))
    ask = HolderQuery(MODEL, PLACE, near=HERE)
    found = look(etcd, ask).ready
    # of both, as of such whose zone nobody knows: an instance may just be starting
    assert {record.version for record in found} == {3, 4}
    for number in range(21, 40):
        shelve(etcd, near(number, "a", version=4))
    assert {record.version for record in look(etcd, ask).ready} == {4}
    assert {record.location.zone for record in look(etcd, replace(ask, version=3)).ready} == {"b"}


def test_of_those_that_load_those_of_the_zone_come_and_others_where_it_has_none(
    etcd: CountingEtcd,
) -> None:
    shelve(etcd, near(0, "a"))
    some = [
        shelve(etcd, near(number, "ab"[number % 2], state=RankState.LOADING))
        for number in range(1, 21)
    ]
    ask = HolderQuery(MODEL, PLACE, loading=True, chain=33, near=Location("b"))
    found = look(etcd, replace(ask, me=some[-2]))  # the last but one, in b
    assert found.ahead == 9
    assert names(found.loading) == [f"i{number:05}" for number in range(17, 1, -2)]
    assert names(found.ready) == ["i00000"]  # in a: who is ready, and who loads, are two questions
    first = look(etcd, replace(ask, me=some[0]))
    assert (first.ahead, first.loading) == (0, ())
    nobody = look(etcd, replace(ask, me=some[-1], near=Location("c")))
    assert nobody.ahead == 19
    assert len(nobody.loading) == SAMPLE


def test_who_loads_in_the_zone_still_counts_where_nobody_who_is_ready_there_will_do(
    etcd: CountingEtcd,
) -> None:
    dead = shelve(etcd, near(0, "b"))
    shelve(etcd, near(1, "a"))
    some = [shelve(etcd, near(number, "b", state=RankState.LOADING)) for number in (2, 3)]
    for number in range(4, 20):
        shelve(etcd, near(number, "a", state=RankState.LOADING))
    me = shelve(etcd, near(20, "b", state=RankState.LOADING))
    ask = HolderQuery(MODEL, PLACE, loading=True, me=me, chain=33, near=Location("b"))
    found = look(etcd, replace(ask, usable=lambda one: one.incarnation != dead.incarnation))
    assert names(found.ready) == ["i00001"]
    assert names(found.loading) == [record.instance for record in reversed(some)]


def test_far_behind_a_chain_those_of_the_same_rack_come_too(etcd: CountingEtcd) -> None:
    shelve(etcd, near(0, "b"))
    some = [
        shelve(etcd, near(number, "b", f"r{number % 50}", state=RankState.LOADING))
        for number in range(1, 302)
    ]
    me = some[-1]  # in r1
    found = look(
        etcd, HolderQuery(MODEL, PLACE, loading=True, chain=33, me=me, near=me.location)
    ).loading
    assert len(found) == SAMPLE
    assert sum(record.location.rack == "r1" for record in found) >= 2
    assert all(record.began < me.began for record in found)
    assert list(found) == sorted(found, key=lambda record: record.began, reverse=True)


def test_instances_whose_first_rank_is_in_the_zone_come_first(etcd: CountingEtcd) -> None:
    for number in range(50):
        shelve_instance(etcd, number, 2, location=Location("a"))
    shelve_instance(etcd, 50, 2, location=Location("b"))
    found = look_for_instances(etcd, MODEL, everything, near=HERE)
    assert [status.instance for status in found] == ["i00050"]
    others = look_for_instances(etcd, MODEL, lambda one: one.instance != "i00050", near=HERE)
    assert len(others) == MAX_INSTANCES


def test_entries_of_areas_do_not_make_up_for_ranks_that_have_none(
    etcd: CountingEtcd, scans: Callable[[], float | None]
) -> None:
    shelve(etcd, one(1, location=HERE, model=ModelIdentity("other")))
    shelve(etcd, one(2), indexed=False)
    shelve(etcd, one(3), indexed=False)
    assert sorted(names(look(etcd, HolderQuery(MODEL, PLACE, near=HERE)).ready)) == [
        "i00002",
        "i00003",
    ]
    assert scans() == 1
    etcd.delete(one(2).key)
    etcd.delete(one(3).key)
    assert not look(etcd, HolderQuery(MODEL, PLACE, near=HERE)).scanned


def test_a_version_that_ranks_have_gone_on_from_is_found_where_it_is_retained(
    etcd: CountingEtcd,
) -> None:
    kept = Retained(1, "1" * 32, 64, 4096)
    for number in range(3):
        shelve(etcd, one(number, version=2, retained=(kept,)))
    shelve(etcd, one(7, version=3))
    newest = look(etcd, HolderQuery(MODEL, PLACE))
    assert "i00007" in names(newest.ready)
    asked = HolderQuery(MODEL, PLACE, lambda record: record.as_of(1) is not None, version=1)
    before = etcd.requests
    found = look(etcd, asked)
    assert sorted(names(found.ready)) == ["i00000", "i00001", "i00002"]
    assert etcd.requests - before == 3  # the present ones, the retained ones, the records
    instances = look_for_instances(etcd, MODEL, everything, version=1)
    assert {status.as_of(1).version for status in instances} == {1}
    gone = look(etcd, HolderQuery(MODEL, PLACE, version=9))  # what there is instead
    assert "i00007" in names(gone.ready)
