"""Which keys are followed to hear of some ranks: one stream for all of them. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.etcd.followed import Followed
from engine_registry.schema.keys import instance_prefix
from engine_registry.schema.keyvalue import Snapshot
from engine_registry.schema.record import RankRecord

FEW = 8  # ranks of an instance that are followed each by itself


def follow_ranks(
    etcd: Etcd, records: Sequence[RankRecord], start: Snapshot | None = None
) -> Follower:
    """Follows the records of these ranks, of which there is one at least; of an instance of which
    there are many, all records. `start` has these records, as they stood at its revision.
    """
    by_instance: defaultdict[str, list[str]] = defaultdict(list)
    for record in records:
        by_instance[record.instance].append(record.key)
    wanted = [
        each
        for instance, keys in by_instance.items()
        for each in (
            [Followed(key, exact=True) for key in keys]
            if len(keys) <= FEW
            else [Followed(instance_prefix(instance))]
        )
    ]
    first, *others = wanted
    if not all(each.exact for each in wanted):
        start = None
    return Follower(etcd, first.prefix, exact=first.exact, others=others, start=start)
