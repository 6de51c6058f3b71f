"""The manifest of a rank as etcd holds it: encoded to be registered, and fetched.

Used by `client`, the handle and the gateway. `registration.writes` puts it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine_registry.errors import InvalidField, RecordDamaged
from engine_registry.etcd.client import Etcd
from engine_registry.schema.keys import manifest_part_key
from engine_registry.schema.keyvalue import Range
from engine_registry.schema.manifest import Manifest
from engine_registry.schema.manifest_format import MAX_PARTS, decode, encode
from engine_registry.schema.record import ManifestRef, RankRecord
from engine_registry.schema.tensor_format import END_OF_MEMORY

# in one request: of 1.5 MiB each at most, as etcd takes no more, and an answer may have 64 MiB
_PARTS_AT_ONCE = 32


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
    (found,) = fetch_manifests(etcd, [record])
    if isinstance(found, RecordDamaged):
        raise found
    return found


def fetch_manifests(etcd: Etcd, records: Sequence[RankRecord]) -> list[Manifest | RecordDamaged]:
    """The manifests that belong to the records, in their order, in as few requests as their parts
    take: with the addresses of the version that the record describes. Where one is gone, or not
    the one that the record means, that error stands in its place.
    """
    # by their names: other keys that may lie there are not even fetched
    keys = [key for record in records for key in _part_keys(record)]
    parts: dict[str, bytes] = {}
    for start in range(0, len(keys), _PARTS_AT_ONCE):
        _, found = etcd.read([Range(key) for key in keys[start : start + _PARTS_AT_ONCE]])
        parts |= {item.key: item.value for each in found for item in each.items}
    return [_put_together(record, parts) for record in records]


def _put_together(record: RankRecord, found: Mapping[str, bytes]) -> Manifest | RecordDamaged:
    if record.manifest.parts > MAX_PARTS:
        return RecordDamaged(
            f"the record at {record.key} claims a manifest of {record.manifest.parts} parts",
            key=record.key,
        )
    parts = [found[key] for key in _part_keys(record) if key in found]
    if len(parts) < record.manifest.parts:
        return RecordDamaged(
            f"the manifest of {record.key} is not there (any more): the rank has gone or "
            "registered again",
            key=record.key,
        )
    try:
        manifest = decode(record.key, record.manifest, parts).shifted(record.shift)
        places = [manifest.digests.addr] if manifest.digests is not None else []
        places += [place for region in manifest.regions for place in (region.addr, region.end)]
        if any(not 0 <= place <= END_OF_MEMORY for place in places):
            return RecordDamaged(
                f"the record at {record.key} is damaged: {record.shift} bytes from where the "
                "manifest says there is no memory",
                key=record.key,
            )
        return manifest
    except RecordDamaged as exc:
        return exc


def _part_keys(record: RankRecord) -> list[str]:
    """None where there are too many to be a manifest."""
    parts = record.manifest.parts if record.manifest.parts <= MAX_PARTS else 0
    return [
        manifest_part_key(record.instance, record.rank, record.incarnation, number)
        for number in range(parts)
    ]
