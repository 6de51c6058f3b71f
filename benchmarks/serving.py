"""The sources of the benchmarks: ranks in separate processes that publish and wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from benchmarks.processes import ready
from engine_loader import Publication, PublishOptions, Shard, open_engine, publish
from engine_registry import ModelIdentity, Registry

MODEL = ModelIdentity("bench")
HOST = "127.0.0.1"


def serve(
    endpoint: str,
    instance: str,
    tensors: Mapping[str, torch.Tensor],
    shards: Mapping[str, Shard] | None = None,
    *,
    protocol: str = "tcp",
    rank: int = 0,
    world_size: int = 1,
    digests: bool = False,
    meanwhile: Callable[[Publication], None] = lambda _: ready("published"),
) -> None:
    """Until standard input ends, or for as long as `meanwhile` takes, which says that it serves."""
    with (
        Registry.connect(endpoint) as registry,
        open_engine(HOST, protocol) as engine,
        publish(
            registry,
            engine,
            instance=instance,
            rank=rank,
            world_size=world_size,
            tensors=tensors,
            shards=shards,
            model=MODEL,
            options=PublishOptions(digests=digests),
        ) as publication,
    ):
        meanwhile(publication)
