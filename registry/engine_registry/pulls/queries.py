"""The tickets that lie in etcd now: listed, counted, and waited for until there are none."""

from __future__ import annotations

import time
from collections.abc import Iterable

from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.schema.keys import PULLS, check_instance, pulls_prefix
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.pull_ticket import Pull, decode
from engine_registry.schema.record import RankRecord


def readers_of(etcd: Etcd, record: RankRecord) -> tuple[Pull, ...]:
    """The tickets of the loads that read from this registration."""
    some = _decoded(etcd.snapshot(pulls_prefix(record.instance, record.rank)).items)
    return tuple(pull for pull in some if pull.incarnation == record.incarnation)


def all_pulls(etcd: Etcd, instance: str | None = None) -> tuple[Pull, ...]:
    """The tickets of all loads, or of those that read from the instance."""
    return _decoded(
        etcd.snapshot(PULLS if instance is None else f"{PULLS}{check_instance(instance)}/").items
    )


def _decoded(items: Iterable[KeyValue]) -> tuple[Pull, ...]:
    return tuple(pull for item in items if (pull := decode(item)) is not None)


def count_pulls(etcd: Etcd, instance: str, rank: int) -> int:
    """How many tickets there are for the rank."""
    return etcd.count(pulls_prefix(instance, rank))


def wait_for_no_pulls(etcd: Etcd, instance: str, rank: int, timeout_s: float) -> int:
    """Waits until no load reads from the rank, or the time is over. Returns how many still do."""
    deadline = time.monotonic() + timeout_s
    for _ in Follower(etcd, pulls_prefix(instance, rank), deadline):
        if not count_pulls(etcd, instance, rank):
            return 0
    return count_pulls(etcd, instance, rank)
