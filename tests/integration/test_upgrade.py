"""Versions side by side, as during an upgrade or after a rollback: what this one does with records
of later and earlier ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from engine_registry import InstanceReady, InstanceState, RankJoined, RankLost, Registry
from engine_registry.errors import RankConflict, SchemaUnsupported
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.schema.keys import record_key
from engine_registry.schema.keyvalue import Put
from tests.integration.conftest import events_until
from tests.support.ranks import register


@pytest.fixture
def raw(shared_etcd: LocalEtcd, namespace: str) -> Iterator[Etcd]:
    with closing(
        Etcd(EtcdConfig(parse_endpoints(shared_etcd.endpoint), namespace=namespace))
    ) as etcd:
        yield etcd


def rewrite(raw: Etcd, rank: int, **changes: Any) -> None:
    """The record of rank 0 of `a`, as another version would have written it for `rank`."""
    found = raw.get(record_key("a", 0))
    assert found is not None
    raw.commit(
        [],
        [
            Put(
                record_key("a", rank),
                json.dumps({**json.loads(found.value), "rank": rank, **changes}).encode(),
                found.lease_id,
            )
        ],
    )


def test_a_rank_of_a_later_version_with_the_same_schema_is_read_as_any_other(
    registry: Registry, raw: Etcd
) -> None:
    with register(registry, "a", 0, 2) as ours, registry.watch("a") as watch:
        rewrite(raw, 1, writer="9.9.9", colour="blue", incarnation="f" * 32)
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        assert [record.writer for record in registry.resolve("a")] == [ours.record.writer, "9.9.9"]


def test_a_rank_of_an_earlier_version_without_the_fields_that_came_later_is_read_as_any_other(
    registry: Registry, raw: Etcd
) -> None:
    with register(registry, "a", 0, 2):
        found = raw.get(record_key("a", 0))
        assert found is not None
        bare = {
            name: value
            for name, value in json.loads(found.value).items()
            if name not in ("fabric", "device", "writer", "ended")
        }
        value = json.dumps({**bare, "rank": 1, "incarnation": "f" * 32}).encode()
        raw.commit([], [Put(record_key("a", 1), value, found.lease_id)])
        assert registry.instance("a").state is InstanceState.READY
        assert registry.resolve("a")[1].fabric == ""


def test_a_rank_of_a_newer_schema_is_named_and_the_others_are_served_on(
    registry: Registry, raw: Etcd
) -> None:
    with register(registry, "a", 0, 2), registry.watch() as watch:
        rewrite(raw, 1, schema=99)
        with register(registry, "b", 0, 1):
            events_until(
                watch,
                lambda event: isinstance(event, InstanceReady) and event.status.instance == "b",
            )
            first, second = registry.instances()
            assert first.state is InstanceState.DEGRADED
            assert (
                "/engines/a/1 has schema 99; this version reads up to 2: upgrade"
                in first.problems[0]
            )
            assert second.state is InstanceState.READY
            with pytest.raises(SchemaUnsupported, match="reads up to 2: upgrade"):
                registry.resolve("a")


def test_a_rank_that_is_rolled_back_is_refused_while_its_newer_self_is_registered(
    registry: Registry, raw: Etcd
) -> None:
    with register(registry, "a", 0, 2):
        rewrite(raw, 1, schema=99)
        with pytest.raises(RankConflict, match="has schema 99"):
            register(registry, "a", 1, 2)
    with register(
        registry, "a", 1, 2
    ) as ours:  # the newer one has ended, here with the lease that it shares
        assert registry.ranks("a") == (ours.record,)


def test_a_cleaning_watch_leaves_ranks_of_a_newer_schema_alone(
    registry: Registry, raw: Etcd
) -> None:
    """Upgrading ranks before watchers: the loss of an old rank evicts the other old ones, never the
    new.
    """
    with register(registry, "a", 0, 3), registry.cleaning_watch("a", grace_s=0.5) as watch:
        leaves = register(registry, "a", 1, 3)
        rewrite(raw, 2, schema=99)
        events = iter(watch)
        _until(events, RankJoined, 1)
        leaves.withdraw()
        _until(events, RankLost, 1)
        _until(events, RankLost, 0)
        assert raw.get(record_key("a", 0)) is None
        assert raw.get(record_key("a", 2)) is not None


def _until(events: Iterator[Any], kind: type, rank: int) -> None:
    for event in events:
        if isinstance(event, kind) and event.record.rank == rank:  # type: ignore[attr-defined]
            return
