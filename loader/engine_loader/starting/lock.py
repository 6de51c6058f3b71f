"""The election among ranks that start with the same weights: its leader reads files. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from engine_registry import ModelIdentity


def lock_name(
    model: ModelIdentity, rank: int, world_size: int, topology: Mapping[str, tuple[int, int]]
) -> str:
    """The name of the election among all processes that start with this rank of the model."""
    identity = [
        model.name,
        model.revision,
        model.dtype,
        model.quantization,
        dict(model.extra),
        rank,
        world_size,
        dict(topology),
    ]
    return f"seed/{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]}"
