"""The tickets that lie in etcd now: listed, counted, and waited for until there are none."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.schema.keys import PULLS, check_instance, pulls_prefix
from engine_registry.schema.keyvalue import KeyValue, under
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


def count_pulls(etcd: Etcd, records: Sequence[RankRecord]) -> dict[str, int]:
    """How many tickets there are for each of the ranks, by incarnation, in one request."""
    prefixes = [pulls_prefix(record.instance, record.rank) for record in records]
    _, found = etcd.read([under(prefix, count_only=True) for prefix in prefixes])
    return {record.incarnation: one.count for record, one in zip(records, found, strict=True)}


def wait_for_no_pulls(
    etcd: Etcd, instance: str, rank: int, timeout_s: float, content: str = ""
) -> int:
    """Waits until no load reads from the rank, or the time is over. Returns how many still do.
    With `content`, only of loads that read this one, or do not say which.
    """
    prefix = pulls_prefix(instance, rank)

    def count() -> int:
        if not content:
            return etcd.count(prefix)
        some = _decoded(etcd.snapshot(prefix).items)
        return sum(pull.content in ("", content) for pull in some)

    for _ in Follower(etcd, prefix, time.monotonic() + timeout_s):
        if not count():
            return 0
    return count()
