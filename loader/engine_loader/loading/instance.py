"""Several ranks into one process, all of one launch and version."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import torch

from engine_loader.engines.base import Engine
from engine_loader.loading.load import load
from engine_loader.loading.report import LoadReport
from engine_loader.loading.together import load_together
from engine_loader.options import LoadOptions, refuse
from engine_loader.sources.holdings import ranks_of_best
from engine_loader.sources.released import pinned
from engine_loader.tensors.shards import Shard
from engine_registry import Registry
from engine_registry.errors import InvalidField
from engine_registry.watching.waiting import Wanted

_REFUSED = {
    "version": "leave it out to load the newest version, or say released",
    "contents": "leave it out: all ranks are loaded in the contents that are found first",
}


def load_instance(
    registry: Registry,
    engine: Engine,
    source: Wanted,
    *,
    tensors: Mapping[int, Mapping[str, torch.Tensor]],
    shards: Mapping[int, Mapping[str, Shard]] | None = None,
    timeout_s: float = 60.0,
    options: LoadOptions = LoadOptions(),
) -> dict[int, LoadReport]:
    """Loads several ranks into one process, one after another.

    All ranks come from one launch and one version. If the source is updated or started again in
    between, all ranks are loaded again.

    Args:
        registry: Finds the sources.
        engine: Reads their memory.
        source: As for `load`.
        tensors: The tensors to fill, by name, for each rank.
        shards: Which part of the whole a tensor is, by name, for each rank.
        timeout_s: How many seconds to wait until a source is ready.
        options: How to choose, read and check; see LoadOptions. Without `contents`, and with no
            `version` but `"released"`.

    Returns:
        What each load did, by rank.

    Raises:
        LoaderError: What `load` raises.
        RegistryError: What `load` raises.
    """
    refuse(options, "load_instance", _REFUSED)
    if not tensors:
        raise InvalidField("there are no ranks to load", "name one in `tensors`", field="tensors")

    def load_all(wait_s: float) -> dict[int, LoadReport]:
        deadline = time.monotonic() + wait_s
        chosen = pinned(registry, source, options, wait_s)
        if chosen.contents is None:
            like = next(iter(tensors))
            ranks = ranks_of_best(registry, engine, source, like, deadline, chosen)
            chosen = replace(options, contents=[record.content for record in ranks])
        return {
            rank: load(
                registry,
                engine,
                source,
                rank=rank,
                tensors=of_rank,
                shards=(shards or {}).get(rank),
                timeout_s=wait_s,
                options=chosen,
            )
            for rank, of_rank in tensors.items()
        }

    reports, _ = load_together(load_all, timeout_s, "one rank and the next", options.version)
    return reports
