"""All instances, kept up to date: as a list would show them, at each change."""

from __future__ import annotations

import pytest

from engine_registry import InstanceState, RankState
from engine_registry.errors import EtcdRefused
from engine_registry.schema.keyvalue import Deletion, KeyValue, Snapshot
from engine_registry.schema.labels import Selector
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import encode
from engine_registry.watching.follow import AllInstances
from tests.support.builders import a_record
from tests.support.feed import Feed


def item(record: RankRecord) -> KeyValue:
    return KeyValue(record.key, encode(record), 1, 1, 1)


def states(instances: AllInstances) -> dict[str, InstanceState]:
    return {status.instance: status.state for status in instances.now()}


def test_instances_are_known_as_they_come_change_and_go() -> None:
    a, b = a_record(instance="a", world_size=1), a_record(instance="b", world_size=2)
    feed = Feed(item(a))
    with AllInstances(feed) as instances:
        feed.give(item(b))
        feed.wait_until_taken(1)
        assert states(instances) == {"a": InstanceState.READY, "b": InstanceState.DEGRADED}
        feed.give(item(a_record(instance="b", rank=1, world_size=2)))
        feed.give(item(a_record(instance="a", world_size=1, state=RankState.UPDATING)))
        feed.wait_until_taken(3)
        assert states(instances) == {"a": InstanceState.DEGRADED, "b": InstanceState.READY}
        feed.give(item(a_record(instance="a", world_size=1, ended="withdrawn")))
        feed.give(KeyValue(b.key, b"{", 1, 1, 1))
        feed.wait_until_taken(5)
        assert states(instances) == {"b": InstanceState.DEGRADED}
        feed.give(Deletion(b.key, 6), Deletion("/engines/b/1", 6))
        feed.wait_until_taken(6)
        assert states(instances) == {}
    assert not instances._thread.is_alive()


def test_a_reader_gets_what_is_there_and_then_all_that_has_changed_meanwhile_as_one() -> None:
    feed = Feed(item(a_record(instance="a")))
    with AllInstances(feed) as instances:
        found = iter(instances)
        assert [status.instance for status in next(found)] == ["a"]
        for number, name in enumerate("bcd"):
            feed.give(item(a_record(instance=name)))
            feed.wait_until_taken(number + 1)
        assert [status.instance for status in next(found)] == ["a", "b", "c", "d"]
        instances.stop()
        assert list(found) == []


def test_an_instance_that_does_not_change_stays_the_same_object() -> None:
    feed = Feed(item(a_record(instance="a")))
    with AllInstances(feed) as instances:
        found = iter(instances)
        (before,) = next(found)
        feed.give(item(a_record(instance="b")))
        after, _ = next(found)
        assert after is before


def test_only_what_the_selector_chooses_is_known() -> None:
    feed = Feed(item(a_record(instance="a", labels={"team": "x"})), item(a_record(instance="b")))
    with AllInstances(feed, Selector.parse("team=x")) as instances:
        assert [status.instance for status in next(iter(instances))] == ["a"]


def test_what_etcd_refuses_for_good_is_raised() -> None:
    class Refusing(Feed):
        def snapshot(self, prefix: str, exact: bool = False) -> Snapshot:
            raise EtcdRefused("no permission")

    with AllInstances(Refusing()) as instances, pytest.raises(EtcdRefused, match="no permission"):
        next(iter(instances))
