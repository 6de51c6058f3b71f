"""A rank that serves what it reads from files. Used by `engines register`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch

from engine_loader.engines.base import Engine
from engine_loader.files.disk import DiskRead
from engine_loader.files.stored import Files
from engine_loader.options import PublishOptions
from engine_loader.publishing.opening import open_publication
from engine_loader.publishing.publication import Publication
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.shards import Shard
from engine_loader.tensors.uses import USES
from engine_loader.transfer.progress import OnProgress
from engine_registry import ModelIdentity, Registry


def publish_files(
    registry: Registry,
    engine: Engine,
    files: Files,
    tensors: Mapping[str, torch.Tensor],
    *,
    instance: str,
    rank: int,
    world_size: int,
    model: ModelIdentity,
    shards: Mapping[str, Shard],
    topology: Mapping[str, tuple[int, int]],
    options: PublishOptions,
    progress: OnProgress,
) -> Publication:
    """Registers the rank as loading, fills the tensors from the files, and serves them then.

    So a rank that is taken is refused before the read, and the others see who reads. Raises what
    `publish` and `read_into` raise; nothing stays registered then.
    """
    weights = Destination.of(tensors, shards)
    read = DiskRead(files, weights.parts, weights.manifest)
    with (
        USES.fill(f"a read of weights for {instance}/{rank}", weights.runs) as filling,
        ExitStack() as undo,
    ):
        publication = undo.enter_context(
            open_publication(
                registry,
                engine,
                weights,
                instance=instance,
                rank=rank,
                world_size=world_size,
                model=model,
                topology=topology,
                options=options,
                filled_by=filling,
            )
        )
        read.read(progress)
        publication.complete(filled_by=filling)
        undo.pop_all()
    return publication
