"""Registrations of made-up ranks, for tests that need no weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine_registry import Manifest, ModelIdentity, Region, Registration, Registry, TensorEntry
from engine_registry.etcd.client import Etcd
from engine_registry.schema import manifest_format as manifests
from engine_registry.schema.keyvalue import Put
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import encode

MODEL = ModelIdentity("tiny", "r1")
MANIFEST = Manifest((TensorEntry("w", "float32", (4,), 4096, 16, (4,), (0,)),), (Region(4096, 16),))


def register(
    registry: Registry, instance: str = "a", rank: int = 0, world_size: int = 1, **fields: Any
) -> Registration:
    return registry.register(
        **{
            "instance": instance,
            "rank": rank,
            "world_size": world_size,
            "model": MODEL,
            "manifest": MANIFEST,
            "session_id": "127.0.0.1:1",
            "protocol": "tcp",
            "header_addr": 8192,
            "ttl_s": 3.0,
            **fields,
        }
    )


def put_ranks(
    etcd: Etcd, instance: str, world_size: int, *, at_once: int = 100, **fields: Any
) -> None:
    """All ranks of an instance that no process stands behind, in transactions of `at_once`.

    Puts them again where they are.
    """
    ref, _ = manifests.encode(MANIFEST)
    record = RankRecord(
        incarnation="0" * 32,
        instance=instance,
        rank=0,
        world_size=world_size,
        model=MODEL,
        session_id="h:1",
        protocol="tcp",
        manifest=ref,
        header_addr=0,
        registered_at="2026-01-01T00:00:00+00:00",
    )
    lease_id = etcd.grant(600)
    ranks = [replace(record, rank=rank, **fields) for rank in range(world_size)]
    for start in range(0, world_size, at_once):
        etcd.commit(
            [], [Put(each.key, encode(each), lease_id) for each in ranks[start : start + at_once]]
        )
