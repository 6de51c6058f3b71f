"""Released versions over a real etcd: which one is, who keeps one back, what watches tell."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from engine_registry import (
    InstanceReady,
    ModelIdentity,
    Registration,
    Registry,
    Release,
    VersionReleased,
)
from engine_registry.errors import EtcdUnavailable, InvalidField, ReleaseIncomplete
from engine_registry.etcd.local import LocalEtcd
from engine_registry.registration.eviction import evict
from engine_registry.schema.keys import release_key
from engine_registry.schema.record import Retained, new_content
from tests.integration.conftest import events_until
from tests.support.ranks import MODEL, put_ranks, register
from tests.support.waiting import wait_until


def go_on(rank: Registration, version: int, keep: int = 1) -> None:
    """As a snapshot does: the versions before this one stay, as many as `keep`."""
    before = rank.record
    former = Retained(before.version, before.content, before.header_addr, before.shift)
    rank.switch(
        Retained(version, new_content(), before.header_addr), [former, *before.retained][:keep]
    )


class Ranks:
    """Both ranks of an instance, which this process registers."""

    def __init__(self, registry: Registry, stack: ExitStack, version: int = 0) -> None:
        self.ranks = [
            stack.enter_context(
                register(registry, rank=rank, world_size=2, version=version, ttl_s=30.0)
            )
            for rank in range(2)
        ]

    def go_on(self, version: int, keep: int = 1) -> None:
        for rank in self.ranks:
            go_on(rank, version, keep)


def test_a_version_is_released_when_the_last_rank_has_come_to_it(registry: Registry) -> None:
    with ExitStack() as stack:
        ranks = Ranks(registry, stack)
        go_on(ranks.ranks[0], 1)
        with pytest.raises(ReleaseIncomplete, match=r"kept back by rank 1 \(version 0\)"):
            registry.release("a", 1)
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(registry.release, "a", 1, 60.0)
            go_on(ranks.ranks[1], 1)
            release = made.result()
        assert registry.released("a") == release
        assert release.contents == tuple(rank.record.content for rank in ranks.ranks)
    assert registry.released("a") is None


def test_who_waits_hears_at_once_that_a_rank_has_gone_on_for_good(registry: Registry) -> None:
    with ExitStack() as stack:
        ranks = Ranks(registry, stack)
        go_on(ranks.ranks[0], 1)
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(registry.release, "a", 1, 600.0)
            ranks.ranks[1].update(version=2, retained=())
            with pytest.raises(ReleaseIncomplete, match=r"rank 1 \(version 2\)"):
                made.result()


def test_of_many_who_release_at_once_one_writes_and_all_find_it_done(
    registry: Registry, shared_etcd: LocalEtcd, namespace: str
) -> None:
    with ExitStack() as stack:
        ranks = Ranks(registry, stack)
        others = [
            stack.enter_context(Registry.connect(shared_etcd.endpoint, namespace=namespace))
            for _ in range(8)
        ]
        with registry.watch("a") as watch, ThreadPoolExecutor(8) as pool:
            for version in range(1, 6):
                ranks.go_on(version)
                barrier = threading.Barrier(8)

                def release(
                    each: Registry, version: int = version, barrier: threading.Barrier = barrier
                ) -> Release:
                    barrier.wait()
                    return each.release("a", version, 60.0, rank=others.index(each) % 2)

                assert len(set(pool.map(release, others))) == 1
            told = events_until(watch, lambda event: is_release(event, 5))
        versions = [event.version for event in told if isinstance(event, VersionReleased)]
        assert versions == [1, 2, 3, 4, 5]


def is_release(event: object, version: int) -> bool:
    return isinstance(event, VersionReleased) and event.version == version


def test_a_rollback_releases_an_older_version_that_all_retain(registry: Registry) -> None:
    with ExitStack() as stack:
        ranks = Ranks(registry, stack)
        first = registry.release("a", 0)
        ranks.go_on(1)
        registry.release("a", 1)
        with pytest.raises(InvalidField, match="older than version 1"):
            registry.release("a", 0)
        with registry.watch("a") as watch:
            events_until(watch, lambda event: is_release(event, 1))
            back = registry.rollback("a", 0)
            event = events_until(watch, lambda event: is_release(event, 0))[-1]
        assert (back.version, back.contents) == (0, first.contents)
        assert isinstance(event, VersionReleased)
        assert event.previous is not None
        assert event.previous.version == 1
        ranks.go_on(2)
        with pytest.raises(ReleaseIncomplete, match=r"ranks 0-1 \(versions 1 and 2\)"):
            registry.rollback("a", 0)


def test_a_wait_for_a_release_ends_with_the_first(registry: Registry) -> None:
    with ExitStack() as stack:
        ranks = Ranks(registry, stack)
        with ThreadPoolExecutor(2) as pool:
            named = pool.submit(registry.released, "a", 60.0)
            of_model = pool.submit(registry.released, MODEL, 60.0)
            made = registry.release("a", 0)
            assert named.result() == of_model.result() == made
            assert registry.released(ModelIdentity("another")) is None
            assert registry.released(["b", "a"]) == made
            assert registry.wait_while_released("a", 1, 60.0)
            assert not registry.wait_while_released("a", 0, 0.01)
            waited = pool.submit(registry.wait_while_released, "a", 0, 60.0)
            ranks.go_on(1)
            registry.release("a", 1)
            assert waited.result()


def test_of_a_model_the_newest_release_that_its_ranks_hold_is_found(registry: Registry) -> None:
    with ExitStack() as stack:
        for name, version in (("old", 3), ("new", 4), ("gone on", 5)):
            rank = stack.enter_context(
                register(registry, instance=name.replace(" ", "-"), version=version)
            )
            registry.release(rank.record.instance, version)
        rank.update(version=6, content=new_content())
        found = registry.released(MODEL)
        assert found is not None
        assert (found.instance, found.version) == ("new", 4)


def test_an_instance_of_thousands_of_ranks_is_released_by_one_small_key(
    registry: Registry,
) -> None:
    put_ranks(registry._etcd, "big", 2000, content="ab" * 16)
    made = registry.release("big", 0)
    item = registry._etcd.get(release_key("big"))
    assert item is not None
    assert len(item.value) < 400
    assert registry.released("big") == made
    assert made.contents == ("ab" * 16,) * 2000


def test_an_eviction_ends_the_release_with_the_rank_that_made_it(registry: Registry) -> None:
    with ExitStack() as stack:
        ranks = Ranks(registry, stack)
        registry.release("a", 0, rank=1)
        (record,) = [one for one in registry.ranks("a") if one.rank == 1]
        assert evict(registry._etcd, record)
        wait_until(lambda: registry.released("a") is None)
        assert ranks.ranks[0].lost is None


# -- faults
# --------------------------------------------------------------------------------------------------


def test_a_release_waits_out_an_outage_of_etcd(own_etcd: LocalEtcd) -> None:
    with (
        Registry.connect(own_etcd.endpoint, timeout_s=2.0) as registry,
        ExitStack() as stack,
    ):
        ranks = Ranks(registry, stack)
        own_etcd.kill()
        with pytest.raises(EtcdUnavailable):
            registry.release("a", 0)
        with pytest.raises(EtcdUnavailable):
            registry.release("a", 0, timeout_s=0.5)
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(registry.release, "a", 1, 120.0)
            own_etcd.start()
            ranks.go_on(1)
            assert made.result().version == 1


def test_a_watch_tells_each_release_once_across_outages_of_etcd(own_etcd: LocalEtcd) -> None:
    with (
        Registry.connect(own_etcd.endpoint, timeout_s=20.0) as registry,
        ExitStack() as stack,
    ):
        ranks = Ranks(registry, stack)
        watch = stack.enter_context(registry.watch())
        told: list[int] = []

        def see(version: int) -> None:
            events = events_until(watch, lambda event: is_release(event, version))
            told.extend(one.version for one in events if isinstance(one, VersionReleased))

        for version in range(1, 4):
            ranks.go_on(version)
            registry.release("a", version, 60.0)
            if version < 3:
                own_etcd.kill()
                own_etcd.start()
            see(version)
        assert told == [1, 2, 3]


def test_the_first_snapshot_of_a_watch_tells_the_release_after_the_instance(
    registry: Registry,
) -> None:
    with ExitStack() as stack:
        Ranks(registry, stack)
        registry.release("a", 0)
        with registry.watch() as watch:
            events = events_until(watch, lambda event: is_release(event, 0))
        assert isinstance(events[-2], InstanceReady)
