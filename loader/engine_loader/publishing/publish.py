"""`publish` and `publish_state_dict`: the weights of a rank become readable for loaders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from engine_loader.engines.base import Engine
from engine_loader.options import PublishOptions, refuse
from engine_loader.publishing.opening import open_publication
from engine_loader.publishing.publication import Publication
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.shards import Shard
from engine_loader.tensors.state_dict import flatten, whole
from engine_registry import ModelIdentity, Registry
from engine_registry.schema.keys import check_rank
from engine_registry.schema.topology import check_topology


def publish(
    registry: Registry,
    engine: Engine,
    *,
    instance: str,
    rank: int,
    world_size: int,
    tensors: Mapping[str, torch.Tensor],
    model: ModelIdentity,
    shards: Mapping[str, Shard] | None = None,
    topology: Mapping[str, tuple[int, int]] | None = None,
    options: PublishOptions = PublishOptions(),
) -> Publication:
    """Offers the tensors of a rank to loaders.

    They are offered until the publication is closed or the process ends. DTensors say themselves
    which box of the whole they are, and `shards` says it of other tensors. A tensor without a box
    only loads into the same rank. Nothing stays registered if the call raises, here or in etcd.

    Args:
        registry: Where the rank is registered.
        engine: Serves the memory.
        instance: The name of the instance.
        rank: The world rank of this process in the instance, from 0.
        world_size: How many ranks the instance has, over all parallel axes.
        tensors: The tensors, by name. A `Destination` keeps its inspection of them.
        model: The model that the instance runs.
        shards: Which part of the whole a tensor is, by name.
        topology: The place of the rank along each parallel axis: (index, size) by axis.
        options: How to publish; see PublishOptions.

    Returns:
        The publication, which the caller closes.

    Raises:
        TensorsUnusable: Tensors cannot be served, or values cannot be encoded.
        SnapshotsUnfit: There is no memory for snapshots or deltas.
        EngineFailed: The engine cannot register the memory.
        MemoryInUse: A load fills the memory.
        InvalidField: An argument is not valid; `details["field"]` names it.
        RankConflict: Another process holds the rank.
        InstanceMismatch: The rank disagrees with its siblings.
        KeeperFailed: The process that holds the lease cannot be started.
        EtcdError: Etcd cannot be reached, or refuses.
    """
    rank, world_size = check_rank(rank, world_size)
    topology = check_topology(topology or {})
    return open_publication(
        registry,
        engine,
        Destination.of(tensors, shards),
        instance=instance,
        rank=rank,
        world_size=world_size,
        model=model,
        topology=topology,
        options=options,
    )


def publish_state_dict(
    registry: Registry,
    engine: Engine,
    state_dict: Mapping[str, Any],
    *,
    instance: str,
    rank: int,
    world_size: int,
    model: ModelIdentity,
    shards: Mapping[str, Shard] | None = None,
    topology: Mapping[str, tuple[int, int]] | None = None,
    options: PublishOptions = PublishOptions(),
) -> Publication:
    """Publishes a state dict as torch's distributed checkpoint would save it.

    It may be nested, and hold DTensors and values that are no tensors. A plain tensor without a
    shard stands for the whole, as in a distributed checkpoint.

    Args:
        registry: Where the rank is registered.
        engine: Serves the memory.
        state_dict: Tensors and plain data by name, nested as the caller likes.
        instance: The name of the instance.
        rank: The world rank of this process in the instance, from 0.
        world_size: How many ranks the instance has, over all parallel axes.
        model: The model that the instance runs.
        shards: Which part of the whole a tensor is, by its flattened name.
        topology: The place of the rank along each parallel axis: (index, size) by axis.
        options: How to publish; see PublishOptions. Without `values`, which the state dict has.

    Returns:
        The publication, which the caller closes.

    Raises:
        TensorsUnusable: Entries cannot be served, or have the same flattened name.
        LoaderError: What `publish` raises.
        RegistryError: What `publish` raises.
    """
    refuse(options, "publish_state_dict", {"values": "put them into the state dict"})
    tensors, values = flatten(state_dict)
    return publish(
        registry,
        engine,
        instance=instance,
        rank=rank,
        world_size=world_size,
        tensors=tensors,
        model=model,
        shards={**whole(tensors), **(shards or {})},
        topology=topology,
        options=replace(options, values=values),
    )
