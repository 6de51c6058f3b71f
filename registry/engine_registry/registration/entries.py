"""What a rank writes into the index of holders, beside its record. Pure; used by
`registration.writes`.
"""

from __future__ import annotations

from engine_registry.errors import RecordDamaged
from engine_registry.schema.holder import holder_keys
from engine_registry.schema.keyvalue import Delete, KeyValue, Put
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import decode_item


def moved_entries(before: KeyValue | None, record: RankRecord, lease_id: int) -> list[Put | Delete]:
    """The record's entries in the index, and the end of those that what stood there has had."""
    keys = _keys_of(record)
    former = {delete.key: delete for delete in entry_deletions(before)} if before else {}
    same_lease = before is not None and before.lease_id == lease_id
    stay = {key for key in keys if same_lease and key in former}
    return [
        *(delete for key, delete in former.items() if key not in keys),
        *(Put(key, record.key.encode(), lease_id) for key in keys if key not in stay),
    ]


def entry_deletions(held: KeyValue) -> list[Delete]:
    """Of all entries of the record that stands there; none where it is damaged."""
    try:
        return [Delete(key) for key in _keys_of(decode_item(held))]
    except RecordDamaged:
        return []


def _keys_of(record: RankRecord) -> list[str]:
    """None where its process has ended, and its memory is held."""
    return [] if record.held else holder_keys(record)
