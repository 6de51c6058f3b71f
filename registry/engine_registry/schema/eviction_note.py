"""The note that a cleaning watcher leaves in etcd when an instance has lost a rank, so that the
next watcher knows what to evict.

`/doomed/<instance>`, JSON, under a lease that outlives the grace period. It names registrations, so
a later launch is never meant; whether the instance is still incomplete is for its reader to see.
Pure.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from engine_registry.errors import RecordDamaged, SchemaUnsupported
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import decode, encode

SCHEMA = 1


@dataclass(frozen=True)
class EvictionNote:
    """`lost` is the rank whose loss began it, `incarnations` the registrations that stood then."""

    lost: RankRecord
    incarnations: frozenset[str]

    def encode(self) -> bytes:
        lost = {"key": self.lost.key, "record": encode(self.lost).decode()}
        return json.dumps(
            {"schema": SCHEMA, "lost": lost, "incarnations": sorted(self.incarnations)}
        ).encode()

    @classmethod
    def decode(cls, key: str, value: bytes) -> EvictionNote:
        """RecordDamaged or SchemaUnsupported say which key and why."""
        try:
            data = json.loads(value)
            if data["schema"] > SCHEMA:
                raise SchemaUnsupported(
                    f"the note at {key} has schema {data['schema']}; this version reads up "
                    f"to {SCHEMA}",
                    "upgrade engine-registry",
                    key=key,
                    schema=data["schema"],
                )
            lost = decode(data["lost"]["key"], data["lost"]["record"].encode())
            return cls(lost, frozenset(map(str, data["incarnations"])))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise RecordDamaged(f"the note at {key} is damaged: {exc}", key=key) from exc
