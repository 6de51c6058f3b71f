"""Several ranks into one process, all of one launch and version."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import torch

from engine_loader.engines.base import Engine
from engine_loader.loading.load import Verify, load
from engine_loader.loading.report import LoadReport
from engine_loader.loading.together import load_together
from engine_loader.sources.catalogue import ranks_of_best
from engine_loader.tensors.regions import Shard
from engine_loader.transfer.scheduler import OnProgress
from engine_registry import Registry
from engine_registry.errors import InvalidField
from engine_registry.watching.waiting import Wanted


def load_instance(
    registry: Registry,
    engine: Engine,
    source: Wanted,
    *,
    tensors: Mapping[int, Mapping[str, torch.Tensor]],
    shards: Mapping[int, Mapping[str, Shard]] | None = None,
    timeout_s: float = 60.0,
    verify: Verify = "header",
    max_sources: int = 4,
    progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
) -> dict[int, LoadReport]:
    """As `load`, for the tensors of several ranks, by rank, one after another: all of one launch
    and version, or an error.

    Where the source is updated or started again in between all are loaded again.
    """
    if not tensors:
        raise InvalidField("there are no ranks to load", field="tensors")

    def load_all(wait_s: float) -> dict[int, LoadReport]:
        ranks = ranks_of_best(
            registry, engine, source, next(iter(tensors)), time.monotonic() + wait_s
        )
        return {
            rank: load(
                registry,
                engine,
                source,
                rank=rank,
                tensors=of_rank,
                shards=(shards or {}).get(rank),
                timeout_s=wait_s,
                verify=verify,
                contents=[record.content for record in ranks],
                max_sources=max_sources,
                progress=progress,
                cancel=cancel,
            )
            for rank, of_rank in tensors.items()
        }

    reports, _ = load_together(load_all, timeout_s, "one rank and the next")
    return reports
