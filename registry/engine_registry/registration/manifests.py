"""The manifest of a registered rank, fetched from etcd.

Used by `client` and the gateway. `registration.writes` puts it there.
"""

from __future__ import annotations

from engine_registry.errors import RecordDamaged
from engine_registry.etcd.client import Etcd
from engine_registry.schema.keys import manifest_part_key
from engine_registry.schema.manifest import Manifest
from engine_registry.schema.manifest_format import MAX_PARTS, decode
from engine_registry.schema.record import RankRecord


def fetch_manifest(etcd: Etcd, record: RankRecord) -> Manifest:
    """The manifest that belongs to the record; RecordDamaged where it is gone or not the one that
    the record means.
    """
    if record.manifest.parts > MAX_PARTS:
        raise RecordDamaged(
            f"the record at {record.key} claims a manifest of {record.manifest.parts} parts",
            key=record.key,
        )
    parts = []
    # one by one: other keys that may lie there are not even fetched
    for number in range(record.manifest.parts):
        part = etcd.get(manifest_part_key(record.instance, record.rank, record.incarnation, number))
        if part is None:
            raise RecordDamaged(
                f"the manifest of {record.key} is not there (any more): the rank has gone or "
                "registered again",
                key=record.key,
            )
        parts.append(part.value)
    return decode(record.key, record.manifest, parts)
