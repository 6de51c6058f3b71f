"""The note that a cleaning watcher leaves in etcd when an instance has lost a rank, so that the
next watcher knows what to evict.

`/eviction-notes/<instance>`, JSON, under a lease that outlives the grace period. It names
registrations, so a later launch is never meant; whether the instance is still incomplete is for its
reader to see. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from engine_registry.errors import RecordDamaged, SchemaUnsupported
from engine_registry.schema import structs
from engine_registry.schema.printable import short
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import decode, encode
from engine_registry.schema.structs import Malformed

SCHEMA = 1


class _Lost(msgspec.Struct, frozen=True):
    key: str
    record: str  # as it lies under the key


class _Note(msgspec.Struct, frozen=True):
    """In the order in which they are written."""

    schema: int
    lost: _Lost
    incarnations: list[str]


_DECODER = msgspec.json.Decoder(_Note)


@dataclass(frozen=True)
class EvictionNote:
    """`lost` is the rank whose loss began it, `incarnations` the registrations that stood then."""

    lost: RankRecord
    incarnations: frozenset[str]

    def encode(self) -> bytes:
        """As stored."""
        lost = _Lost(self.lost.key, encode(self.lost).decode())
        return structs.write(_Note(SCHEMA, lost, sorted(self.incarnations)))

    @classmethod
    def decode(cls, key: str, value: bytes) -> EvictionNote:
        """RecordDamaged or SchemaUnsupported say which key and why."""
        try:
            stored = structs.read(_DECODER, value)
        except Malformed as exc:
            _check_schema(key, structs.schema_of(value))
            raise RecordDamaged(f"the note at {key} is damaged: {short(exc)}", key=key) from exc
        _check_schema(key, stored.schema)
        lost = decode(stored.lost.key, stored.lost.record.encode())
        return cls(lost, frozenset(stored.incarnations))


def _check_schema(key: str, schema: int) -> None:
    if schema > SCHEMA:
        raise SchemaUnsupported(
            f"the note at {key} has schema {short(schema)}; this version reads up to {SCHEMA}",
            "upgrade engine-registry",
            key=key,
            schema=schema,
        )
