"""The manifest of a rank as etcd holds it: encoded to be registered, and fetched.

Used by `client`, the handle and the gateway. `registration.writes` puts it there.
"""

from __future__ import annotations

from engine_registry.errors import InvalidField, RecordDamaged
from engine_registry.etcd.client import Etcd
from engine_registry.schema.keys import manifest_part_key
from engine_registry.schema.manifest import Manifest
from engine_registry.schema.manifest_format import MAX_PARTS, decode, encode
from engine_registry.schema.record import ManifestRef, RankRecord


def encode_manifest(manifest: Manifest) -> tuple[ManifestRef, list[bytes]]:
    """What the record says of it, and the parts to store; InvalidField where no reader would take
    it.
    """
    ref, parts = encode(manifest)
    if len(parts) > MAX_PARTS:
        raise InvalidField(
            f"the manifest of {len(manifest.tensors)} tensors takes {len(parts)} MiB, more than "
            f"{MAX_PARTS}",
            field="manifest",
        )
    return ref, parts


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
