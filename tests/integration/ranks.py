"""Registrations of made-up ranks, for tests that need no weights."""

from __future__ import annotations

from typing import Any

from registry import Manifest, ModelIdentity, Region, Registration, Registry, TensorEntry

MODEL = ModelIdentity("tiny", "r1")
MANIFEST = Manifest((TensorEntry("w", "float32", (4,), 4096, 16, (4,), (0,)),), (Region(4096, 16),))


def register(registry: Registry, instance: str = "a", rank: int = 0, world_size: int = 1, **fields: Any) -> Registration:
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
