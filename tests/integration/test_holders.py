"""Finding the weights of a model in a real etcd: a few requests, whatever else is registered, and a
wait that hears of nothing else.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from engine_registry import ModelIdentity, Place, RankRecord, RankState, Registry, failpoints
from engine_registry.errors import EtcdError, InstanceNotFound
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.local import LocalEtcd
from engine_registry.holders.index import SAMPLE
from engine_registry.holders.query import HolderQuery
from engine_registry.schema.holder import holder_key
from engine_registry.schema.keys import HOLDERS
from engine_registry.schema.keyvalue import Put, Range, under
from engine_registry.schema.record_format import encode
from tests.support.builders import a_record
from tests.support.ranks import MODEL, register
from tests.support.waiting import wait_until

OTHER = ModelIdentity("other")
ASK = HolderQuery(MODEL, Place(0), loading=True)


def one(number: int, model: ModelIdentity) -> RankRecord:
    return a_record(
        instance=f"i{number:03}",
        incarnation=hashlib.blake2b(
            bytes([number % 256, number // 256]), digest_size=16
        ).hexdigest(),
        world_size=1,
        topology={},
        order=number + 1,
        model=model,
    )


@pytest.fixture
def raw(registry: Registry) -> Iterator[Etcd]:
    with closing(Etcd(registry.config)) as etcd:
        yield etcd


@pytest.fixture
def crowd(raw: Etcd) -> Iterator[None]:
    """300 ranks that have the model, and 300 that have another."""
    lease_id = raw.grant(600)
    for start in range(0, 600, 50):
        records = [one(number, (MODEL, OTHER)[number % 2]) for number in range(start, start + 50)]
        puts = [Put(record.key, encode(record), lease_id) for record in records]
        entries = [Put(holder_key(record), record.key.encode(), lease_id) for record in records]
        raw.commit([], [*puts, *entries])
    yield
    raw.revoke(lease_id)


def test_a_few_of_many_are_found_and_not_always_the_same(registry: Registry, crowd: None) -> None:
    found = registry.holders(ASK)
    assert len(found.ready) == SAMPLE
    assert not found.all_ready
    assert not found.scanned
    assert all(record.model == MODEL for record in found.ready)
    assert found.readers == {record.incarnation: 0 for record in found.ready}
    seen = {record.instance for _ in range(20) for record in registry.holders(ASK).ready}
    assert len(seen) > 5 * SAMPLE
    assert len(registry.ready(MODEL)) == 4
    wanted = registry.ready(MODEL, usable=lambda status: status.instance == "i122")
    assert [status.instance for status in wanted] == ["i122"]


def test_many_ranges_are_read_at_one_revision_in_as_many_requests_as_etcd_wants(
    raw: Etcd, crowd: None
) -> None:
    keys = [one(number, MODEL).key for number in range(600)]
    revision, found = raw.read([*map(Range, keys), under(HOLDERS, 3), under(HOLDERS, 0, True)])
    assert [item.key for each in found[:-2] for item in each.items] == keys
    assert (len(found[-2].items), found[-2].count) == (3, 600)
    assert (found[-1].items, found[-1].count) == ((), 600)
    assert revision == raw.snapshot("/nothing/").revision


def test_a_registration_is_in_the_index_for_as_long_as_it_lives(
    registry: Registry, raw: Etcd
) -> None:
    def entries() -> list[str]:
        return [item.key for item in raw.snapshot(HOLDERS).items]

    with register(registry, state=RankState.LOADING) as registration:
        (record,) = registry.ranks("a")
        assert record.order
        assert registration.record.order == record.order
        assert entries() == [holder_key(record)]
        registration.update(state=RankState.READY, version=7)
        (changed,) = registry.ranks("a")
        assert entries() == [holder_key(changed)]
        assert "/ready/" in entries()[0]
        assert changed.order == record.order
    assert entries() == []


def test_a_wait_hears_of_its_model_and_rank_and_of_nothing_else(registry: Registry) -> None:
    with registry.watch_holders(MODEL, 0) as watch:
        assert watch.next(20)  # what there is at the beginning
        with (
            register(registry, "other", model=OTHER),
            register(registry, "second", 1, 2),
            register(registry, "loads", state=RankState.LOADING) as loading,
        ):
            assert not watch.next(0.5)
            loading.update(state=RankState.READY)
            assert watch.next(20)
        assert not watch.next(0.2)
    with registry.watch_holders(MODEL) as watch:
        assert watch.next(20)
        with register(registry, "second", 1, 2):
            assert watch.next(20)


def test_a_wait_looks_now_and_then_for_ranks_that_are_not_in_the_index(
    registry: Registry, raw: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_registry.holders.waiting._UNLISTED_S", 0.3)
    found: list[str] = []

    def wait() -> None:
        found.extend(record.instance for record in registry.holders(ASK, 60.0).ready)

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_until(lambda: any("registry watch" in one.name for one in threading.enumerate()))
    lease_id = raw.grant(60)
    record = a_record(instance="old", world_size=1, topology={}, model=MODEL)
    raw.commit([], [Put(record.key, encode(record), lease_id)])
    waiting.join(60)
    assert found == ["old"]
    raw.revoke(lease_id)


def test_a_wait_goes_on_through_an_outage_of_etcd(own_etcd: LocalEtcd) -> None:
    with Registry.connect(own_etcd.endpoint, timeout_s=2.0) as registry:
        results: list[object] = []

        def wait() -> None:
            try:
                results.append(registry.holders(ASK, 120.0).ready[0].instance)
            except EtcdError as exc:
                results.append(exc)

        waiting = threading.Thread(target=wait)
        waiting.start()
        wait_until(lambda: any("registry watch" in one.name for one in threading.enumerate()))
        own_etcd.kill()
        time.sleep(0.5)
        own_etcd.start()
        with register(registry):
            waiting.join(120)
            assert results == ["a"]


def test_a_rank_that_comes_between_two_looks_is_found(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as ranks:
        monkeypatch.setitem(
            failpoints.ACTIONS,
            "holders.before_instances",
            lambda: ranks.enter_context(register(registry)),
        )
        assert [record.instance for record in registry.holders(ASK).ready] == ["a"]


def test_a_wait_that_finds_nobody_says_so_in_time(registry: Registry) -> None:
    start = time.monotonic()
    with pytest.raises(
        InstanceNotFound, match=r"no instance of tiny@r1 is registered after 0\.3 s"
    ):
        registry.holders(ASK, 0.3)
    with pytest.raises(InstanceNotFound):
        registry.ready(MODEL, 0.3)
    assert time.monotonic() - start >= 0.6
    assert not any("registry watch" in one.name for one in threading.enumerate())
