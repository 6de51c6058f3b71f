"""The record of a rank as it lies under `/engines/<instance>/<rank>`: schema 1, JSON, under 4 KB.
Pure.

Decoding ignores fields that it does not know, refuses a newer schema by name, and checks the type
and range of every field: whatever may lie in etcd, a reader gets a good record or `RecordDamaged`.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from engine_registry.errors import InvalidField, RecordDamaged, SchemaUnsupported
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.printable import short
from engine_registry.schema.record import (
    ManifestRef,
    ModelIdentity,
    RankRecord,
    RankState,
    implied_content,
)

SCHEMA = 1
MAX_RECORD_NBYTES = 4096

T = TypeVar("T")


def encode(record: RankRecord) -> bytes:
    """The record as stored; InvalidField where it would exceed 4 KB."""
    model = record.model
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "incarnation": record.incarnation,
        "generation": record.generation,
        "instance": record.instance,
        "rank": record.rank,
        "world_size": record.world_size,
        "topology": {axis: list(place) for axis, place in record.topology.items()},
        "model": {
            "name": model.name,
            "revision": model.revision,
            "dtype": model.dtype,
            "quantization": model.quantization,
            "extra": dict(model.extra),
        },
        "version": record.version,
        "content": record.content,
        "state": record.state.value,
        "session_id": record.session_id,
        "protocol": record.protocol,
        "fabric": record.fabric,
        "host": record.host,
        "pid": record.pid,
        "device": record.device,
        "header": {"addr": record.header_addr},
        "manifest": {
            "digest": record.manifest.digest,
            "parts": record.manifest.parts,
            "tensors": record.manifest.tensors,
            "nbytes": record.manifest.nbytes,
        },
        "registered_at": record.registered_at,
        "writer": record.writer,
    }
    if not record.content:
        del data["content"]
    if record.kept_by:
        data["kept_by"] = record.kept_by
    if record.ended:
        data["ended"] = record.ended
    value = json.dumps(data, separators=(",", ":")).encode()
    if len(value) > MAX_RECORD_NBYTES and not record.ended:
        largest = max(data, key=lambda name: len(json.dumps(data[name])))
        raise InvalidField(
            f"the record of {record.key} takes {len(value)} bytes, more than {MAX_RECORD_NBYTES}",
            f"shorten {largest!r}",
            field=largest,
        )
    return value


def decode(key: str, value: bytes, mod_revision: int = 0, create_revision: int = 0) -> RankRecord:
    """The record stored under `key`; RecordDamaged or SchemaUnsupported say which key and why."""
    if len(value) > 4 * MAX_RECORD_NBYTES:
        raise RecordDamaged(
            f"the record at {key} is damaged: {len(value)} bytes is no record's size", key=key
        )
    try:
        data = json.loads(value)
        schema = _get(data, "schema", int)
        if schema > SCHEMA:
            raise SchemaUnsupported(
                f"the record at {key} has schema {short(schema)}; this version reads up to "
                f"{SCHEMA}",
                "upgrade engine-registry",
                key=key,
                schema=schema,
            )
        record = _from_json(data, mod_revision, create_revision)
    except (ValueError, RecursionError) as exc:  # InvalidField and JSON errors are ValueErrors
        raise RecordDamaged(f"the record at {key} is damaged: {short(exc)}", key=key) from exc
    if record.key != key:
        raise RecordDamaged(
            f"the record at {key} is damaged: it says that it belongs at {record.key}", key=key
        )
    return record


def decode_item(item: KeyValue) -> RankRecord:
    """`decode` of a key as etcd holds it, with both of its revisions."""
    return decode(item.key, item.value, item.mod_revision, item.create_revision)


def _from_json(data: dict[str, Any], mod_revision: int, create_revision: int) -> RankRecord:
    model = _get(data, "model", dict)
    manifest = _get(data, "manifest", dict)
    incarnation, version = _get(data, "incarnation", str), _natural(data, "version")
    return RankRecord(
        incarnation=incarnation,
        instance=_get(data, "instance", str),
        rank=_get(data, "rank", int),
        world_size=_get(data, "world_size", int),
        model=ModelIdentity(
            name=_get(model, "name", str),
            revision=_get(model, "revision", str, ""),
            dtype=_get(model, "dtype", str, ""),
            quantization=_get(model, "quantization", str, ""),
            extra={name: str(value) for name, value in _get(model, "extra", dict, {}).items()},
        ),
        session_id=_get(data, "session_id", str),
        protocol=_get(data, "protocol", str),
        manifest=ManifestRef(
            digest=_get(manifest, "digest", str),
            parts=_natural(manifest, "parts"),
            tensors=_natural(manifest, "tensors"),
            nbytes=_natural(manifest, "nbytes"),
        ),
        header_addr=_natural(_get(data, "header", dict), "addr"),
        registered_at=_get(data, "registered_at", str),
        generation=_get(data, "generation", str, ""),
        topology={
            axis: _place(axis, place) for axis, place in _get(data, "topology", dict, {}).items()
        },
        version=version,
        content=_get(data, "content", str, "") or implied_content(incarnation, version),
        state=RankState(_get(data, "state", str)),
        fabric=_get(data, "fabric", str, ""),
        host=_get(data, "host", str, ""),
        pid=_natural(data, "pid", 0),
        device=_get(data, "device", str, ""),
        writer=_get(data, "writer", str, ""),
        kept_by=_get(data, "kept_by", str, ""),
        ended=_get(data, "ended", str, ""),
        mod_revision=mod_revision,
        create_revision=create_revision,
    )


def _get(data: Any, name: str, kind: type[T], default: T | None = None) -> T:
    if not isinstance(data, dict):
        raise ValueError(f"an object was expected where {name!r} should be")
    value = data.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
            f"{name!r} is missing" if value is None else f"{name!r} is not of type {kind.__name__}"
        )
    return value


def _natural(data: Any, name: str, default: int | None = None) -> int:
    value = _get(data, name, int, default)
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name!r} is out of range: {value}")
    return value


def _place(axis: str, place: Any) -> tuple[int, int]:
    if (
        not isinstance(place, list)
        or len(place) != 2
        or not all(type(number) is int for number in place)
    ):
        raise ValueError(f"topology axis {axis!r} is not [index, size]")
    return place[0], place[1]
