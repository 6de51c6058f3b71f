"""The record of a rank as it lies under `/engines/<instance>/<rank>`: schema 1 or 2, JSON, under
4 KB. Pure.

The Structs here are the fields on the wire. Decoding ignores fields that it does not know, refuses
a newer schema by name, and checks the type and range of every field: whatever may lie in etcd, a
reader gets a good record or `RecordDamaged`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from engine_registry.errors import InvalidField, RecordDamaged, SchemaUnsupported
from engine_registry.schema import structs
from engine_registry.schema.eviction import Eviction
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.location import Location
from engine_registry.schema.printable import short
from engine_registry.schema.record import (
    ManifestRef,
    ModelIdentity,
    RankRecord,
    RankState,
    Retained,
    implied_content,
)
from engine_registry.schema.structs import Malformed, Natural, check_64_bits

SCHEMA = 2  # of a record with `shift`, which a reader of schema 1 would not heed; others have 1
MAX_RECORD_NBYTES = 4096
_ADDED_NBYTES = 1024
_MAX_MODELS = 256


# None of these is ever part of a cycle, and thousands are made for one list. So Python's collector
# has no business with them.


class _Model(msgspec.Struct, frozen=True, gc=False):
    name: str
    revision: str = ""
    dtype: str = ""
    quantization: str = ""
    extra: dict[str, Any] = {}


class _Header(msgspec.Struct, frozen=True, gc=False):
    addr: Natural

    def __post_init__(self) -> None:
        check_64_bits(self, "addr")


class _Manifest(msgspec.Struct, frozen=True, gc=False):
    digest: str
    parts: Natural
    tensors: Natural
    nbytes: Natural

    def __post_init__(self) -> None:
        check_64_bits(self, "parts", "tensors", "nbytes")


class _Retained(msgspec.Struct, frozen=True, gc=False):
    version: Natural
    content: str
    header: _Header
    shift: int = 0


class _Eviction(msgspec.Struct, frozen=True, gc=False):
    by: str
    at: str
    reason: str = ""


class _Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """In the order in which they are written."""

    schema: int
    incarnation: str
    generation: str = ""
    instance: str
    rank: int
    world_size: int
    topology: dict[str, Any] = {}
    model: _Model
    version: Natural
    content: str | UnsetType = UNSET
    state: RankState
    shift: int | UnsetType = UNSET
    retained: list[_Retained] | UnsetType = UNSET
    session_id: str
    protocol: str
    fabric: str = ""
    rails: dict[str, Any] | UnsetType = UNSET
    location: str | UnsetType = UNSET
    host: str = ""
    pid: Natural = 0
    device: str = ""
    header: _Header
    manifest: _Manifest
    registered_at: str
    writer: str = ""
    kept_by: str | UnsetType = UNSET
    unresponsive_since: str | UnsetType = UNSET
    ended: str | UnsetType = UNSET
    held_until: str | UnsetType = UNSET
    labels: dict[str, Any] | UnsetType = UNSET
    eviction: _Eviction | UnsetType = UNSET
    order: Natural | UnsetType = UNSET

    def __post_init__(self) -> None:
        check_64_bits(self, "pid", "order")


_DECODER = msgspec.json.Decoder(_Record)


def encode(record: RankRecord) -> bytes:
    """The record as stored; InvalidField where it would exceed 4 KB.

    What is added to a rank's record later may: its order, that it has ended, or does not answer.
    """
    model, eviction = record.model, record.eviction
    stored = _Record(
        schema=SCHEMA if record.shift else 1,
        incarnation=record.incarnation,
        generation=record.generation,
        instance=record.instance,
        rank=record.rank,
        world_size=record.world_size,
        topology=dict(record.topology),
        model=_Model(
            model.name, model.revision, model.dtype, model.quantization, dict(model.extra)
        ),
        version=record.version,
        content=record.content or UNSET,
        state=record.state,
        shift=record.shift or UNSET,
        retained=[
            _Retained(one.version, one.content, _Header(one.header_addr), one.shift)
            for one in record.retained
        ]
        or UNSET,
        session_id=record.session_id,
        protocol=record.protocol,
        fabric=record.fabric,
        rails=dict(record.rails) or UNSET,
        location=str(record.location) or UNSET,
        host=record.host,
        pid=record.pid,
        device=record.device,
        header=_Header(record.header_addr),
        manifest=_Manifest(
            record.manifest.digest,
            record.manifest.parts,
            record.manifest.tensors,
            record.manifest.nbytes,
        ),
        registered_at=record.registered_at,
        writer=record.writer,
        kept_by=record.kept_by or UNSET,
        unresponsive_since=record.unresponsive_since or UNSET,
        ended=record.ended or UNSET,
        held_until=record.held_until or UNSET,
        labels=dict(record.labels) or UNSET,
        eviction=_Eviction(eviction.by, eviction.at, eviction.reason) if eviction else UNSET,
        order=record.order or UNSET,
    )
    value = structs.write(stored)
    # What others add later may exceed it: the order, that it has ended, or does not answer.
    later = record.order or record.ended or record.unresponsive_since
    if len(value) > MAX_RECORD_NBYTES + (_ADDED_NBYTES if later else 0):
        fields = structs.plain(stored)
        largest = max(fields, key=lambda name: len(structs.write(fields[name])))
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
        stored = structs.read(_DECODER, value)
        _check_schema(key, stored.schema)
        record = _record(stored, mod_revision, create_revision)
    except Malformed as exc:
        _check_schema(key, structs.schema_of(value))
        raise RecordDamaged(f"the record at {key} is damaged: {short(exc)}", key=key) from exc
    except InvalidField as exc:
        raise RecordDamaged(f"the record at {key} is damaged: {short(exc)}", key=key) from exc
    if record.key != key:
        raise RecordDamaged(
            f"the record at {key} is damaged: it says that it belongs at {record.key}", key=key
        )
    return record


def decode_item(item: KeyValue) -> RankRecord:
    """`decode` of a key as etcd holds it, with both of its revisions."""
    return decode(item.key, item.value, item.mod_revision, item.create_revision)


def _check_schema(key: str, schema: int) -> None:
    if schema > SCHEMA:
        raise SchemaUnsupported(
            f"the record at {key} has schema {short(schema)}; this version reads up to {SCHEMA}",
            "upgrade engine-registry",
            key=key,
            schema=schema,
        )


def _record(stored: _Record, mod_revision: int, create_revision: int) -> RankRecord:
    model, manifest, eviction = stored.model, stored.manifest, stored.eviction
    return RankRecord(
        incarnation=stored.incarnation,
        instance=stored.instance,
        rank=stored.rank,
        world_size=stored.world_size,
        model=_model(
            model.name,
            model.revision,
            model.dtype,
            model.quantization,
            tuple((name, str(value)) for name, value in model.extra.items()),
        ),
        session_id=stored.session_id,
        protocol=stored.protocol,
        manifest=ManifestRef(manifest.digest, manifest.parts, manifest.tensors, manifest.nbytes),
        header_addr=stored.header.addr,
        registered_at=stored.registered_at,
        generation=stored.generation,
        topology=stored.topology,
        version=stored.version,
        content=stored.content or implied_content(stored.incarnation, stored.version),
        state=stored.state,
        shift=stored.shift or 0,
        retained=tuple(
            Retained(one.version, one.content, one.header.addr, one.shift)
            for one in stored.retained or ()
        ),
        fabric=stored.fabric,
        rails=stored.rails or {},
        location=Location.parse(stored.location or ""),
        host=stored.host,
        pid=stored.pid,
        device=stored.device,
        writer=stored.writer,
        kept_by=stored.kept_by or "",
        unresponsive_since=stored.unresponsive_since or "",
        ended=stored.ended or "",
        held_until=stored.held_until or "",
        labels=stored.labels or {},
        eviction=Eviction(eviction.by, eviction.at, eviction.reason) if eviction else None,
        order=stored.order or 0,
        mod_revision=mod_revision,
        create_revision=create_revision,
    )


@lru_cache(_MAX_MODELS)
def _model(
    name: str, revision: str, dtype: str, quantization: str, extra: tuple[tuple[str, str], ...]
) -> ModelIdentity:
    """One for all ranks that have it, as thousands do."""
    return ModelIdentity(name, revision, dtype, quantization, dict(extra))
