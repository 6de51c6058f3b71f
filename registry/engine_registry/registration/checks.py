"""Whether a rank may be written: nobody else has it, and its siblings agree with it.

Each answer is a guard for the transaction that writes. Used by `registration.writes`.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection

from engine_registry.errors import InstanceMismatch, RankConflict, RecordDamaged
from engine_registry.etcd.client import Etcd
from engine_registry.schema.keys import instance_prefix
from engine_registry.schema.keyvalue import (
    Guard,
    KeyValue,
    Snapshot,
    absent,
    none_created_since,
    unchanged,
)
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import decode_item

SIBLINGS = 8  # looked at first; all only if none of these is alive


def how_to_delete(etcd: Etcd, key: str, error: RecordDamaged) -> str:
    """What an operator can do about a key that nobody of ours can read, beside what the error
    advises.
    """
    how = (
        "delete the key if no process owns it: etcdctl del "
        f"{shlex.quote(etcd.config.namespace + key)}"
    )
    return f"{error.remedy}; {how}" if error.remedy else how


def check_holder(
    etcd: Etcd, record: RankRecord, holder: KeyValue | None, expected: Collection[str]
) -> Guard:
    if holder is None:
        return absent(record.key)
    try:
        found = decode_item(holder)
    except RecordDamaged as exc:
        raise RankConflict(exc.what, how_to_delete(etcd, record.key, exc), key=record.key) from exc
    # one that is held gives way to whoever has come since, also where that one has ended by now
    if found.incarnation not in expected and (record.ended or not found.ended):
        raise RankConflict(
            f"rank {record.rank} of {record.instance!r} is already registered ({found.holder})",
            "stop that process, choose another rank, or end its registration with `Registry.evict`",
            instance=record.instance,
            rank=record.rank,
            key=record.key,
            host=found.host,
            pid=found.pid,
            since=found.registered_at,
            incarnation=found.incarnation,
        )
    return unchanged(holder)


def check_siblings(etcd: Etcd, record: RankRecord, seen: Snapshot) -> Guard:
    """That they stay the same. `seen` are the first ones, by name."""
    prefix = instance_prefix(record.instance)
    found = _first_alive(seen, record)
    if found is None and len(seen.items) == SIBLINGS:
        seen = etcd.snapshot(prefix)
        found = _first_alive(seen, record)
    if found is None:
        return none_created_since(prefix, seen.revision)
    sibling = decode_item(found)
    theirs = sibling.agreed()
    for field, ours in record.agreed().items():
        if ours != theirs[field]:
            raise InstanceMismatch(
                f"rank {record.rank} of {record.instance!r} has {field} {ours!r}, but rank "
                f"{sibling.rank} is registered "
                f"with {theirs[field]!r} ({sibling.holder}): all ranks of an instance must agree",
                _how_to_agree(field),
                field=field,
                ours=ours,
                theirs=theirs[field],
                sibling=sibling.rank,
            )
    return unchanged(found)


def _how_to_agree(field: str) -> str:
    if field == "generation":  # what remains of another launch, or two that have one name
        return (
            "wait until the ranks of the other launch have ended, end their registrations with "
            "`Registry.evict`, or choose another name for this instance"
        )
    return f"give all ranks the same {field}, or choose another name for this instance"


def _first_alive(seen: Snapshot, record: RankRecord) -> KeyValue | None:
    """The first record of another rank that can be read and has not ended."""
    for item in seen.items:
        try:
            sibling = decode_item(item)
        except RecordDamaged:
            continue
        if sibling.rank != record.rank and not sibling.ended:
            return item
    return None
