"""What a rank writes into the index of holders, beside its record. Pure; used by
`registration.writes`.
"""

from __future__ import annotations

from engine_registry.errors import RecordDamaged
from engine_registry.schema.holder import holder_key
from engine_registry.schema.keyvalue import Delete, KeyValue, Put
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import decode_item


def moved_entry(before: KeyValue | None, record: RankRecord, lease_id: int) -> list[Put | Delete]:
    """The record's entry in the index, and the end of the one that what stood there has had."""
    key = holder_key(record)
    former = entry_deletion(before) if before is not None else []
    moved = [delete for delete in former if delete.key != key]
    same_lease = before is not None and before.lease_id == lease_id
    if not key or (former and not moved and same_lease):
        return list(moved)
    return [*moved, Put(key, record.key.encode(), lease_id)]


def entry_deletion(held: KeyValue) -> list[Delete]:
    try:
        key = holder_key(decode_item(held))
    except RecordDamaged:
        return []
    return [Delete(key)] if key else []
