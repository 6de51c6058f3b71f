"""Weights for a rank that starts: from running ranks of its model if there are any, else from
files, which one of many reads.

Of all processes that start with the same rank of the same model one reads the disk at a time: who
leads their election in etcd. It is registered as loading meanwhile, and its registration's keeper
holds the lead, which so ends as soon as the process does. The others follow etcd, and load from it
as soon as it is complete, or lead next. `starting.start` does it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import torch

from engine_loader.engines.base import Engine
from engine_loader.files.folder import Paths
from engine_loader.loading.load import Verify
from engine_loader.publishing.replica import Replica
from engine_loader.starting.peers import Peers
from engine_loader.starting.start import Seeded, Start
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.regions import Shard
from engine_loader.transfer.pace import Pace
from engine_loader.transfer.scheduler import OnProgress
from engine_registry import ModelIdentity, Place, Registry
from engine_registry.registration.handle import OnState
from engine_registry.schema.keys import check_instance, check_rank
from engine_registry.schema.numbers import seconds, whole
from engine_registry.schema.record import check_version


def load_or_seed(
    registry: Registry,
    engine: Engine,
    model: ModelIdentity,
    tensors: Mapping[str, torch.Tensor],
    *,
    rank: int,
    world_size: int,
    instance: str,
    fallback: Paths,
    shards: Mapping[str, Shard] | None = None,
    topology: Mapping[str, tuple[int, int]] | None = None,
    generation: str | None = None,
    version: int = 0,
    digests: bool = False,
    ttl_s: float = 10.0,
    on_state: OnState | None = None,
    timeout_s: float = 600.0,
    verify: Verify = "header",
    max_sources: int = 4,
    pace: Pace | None = None,
    progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
) -> Seeded:
    """Fills `tensors` in place with those of this rank of the model, and publishes them as `rank`
    of `instance`.

    If a rank like it (of the same model, number, world size and topology) is ready somewhere, or,
    where all tensors say which part of the whole they are, any instance of the model, they come
    from there. Else one process reads them from `fallback`: safetensors files, an index or a folder
    of them (see `files.folder.files_of`), with whole tensors or with this rank's parts, which may
    hold more. All others that start with this rank of the model load from that process when it is
    complete, and from each other meanwhile. `version` is that of the files: they may be older than
    what peers serve.

    Where peers cannot be loaded from, files are read instead, with a warning. Who waits reads on
    its own after `timeout_s`, or after 30 s without etcd: an engine that can start from its disk
    does.

    The caller closes what is returned. Raises WeightsFileInvalid and WeightsMismatch, of the files,
    where nobody has the weights; Cancelled; TensorsUnusable, EngineFailed, RankConflict and
    InstanceMismatch as `publish` does. Nothing stays published then.
    """
    check_instance(instance)
    rank, world_size = check_rank(rank, world_size)
    timeout_s, ttl_s = seconds("timeout_s", timeout_s), seconds("ttl_s", ttl_s)
    version, max_sources = check_version(version), whole("max_sources", max_sources, 1)
    place = Place(rank, world_size, topology or {})
    destination = tensors if isinstance(tensors, Destination) else Destination(tensors, shards)
    boxes = not any(entry.opaque for entry in destination.manifest.tensors)
    replica = Replica(
        instance, rank, world_size, place.topology, generation, digests, ttl_s, on_state
    )
    start = Start(
        registry=registry,
        engine=engine,
        peers=Peers(registry, model, place, boxes),
        model=model,
        rank=rank,
        destination=destination,
        replica=replica,
        fallback=fallback,
        version=version,
        options={"verify": verify, "max_sources": max_sources, "pace": pace},
        progress=progress,
        cancel=cancel or threading.Event(),
        began=time.monotonic(),
        timeout_s=timeout_s,
    )
    return start.run()
