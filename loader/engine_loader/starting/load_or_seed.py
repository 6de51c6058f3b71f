"""Weights for a rank that starts: those that one like it has left on this host, else from running
ranks of its model if there are any, else from files or a function of the engine, by which one of
many reads them.

Of all processes that start with the same rank of the same model, one reads the disk at a time: the
leader of their election in etcd. It is registered as loading meanwhile, and its registration's
keeper holds the lead, which so ends as soon as the process does. The others follow etcd, and load
from it as soon as it is complete, or lead next. `starting.start` does it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import torch

from engine_loader.engines.base import Engine
from engine_loader.options import LoadOptions, PublishOptions, refuse
from engine_loader.publishing.replica import Replica
from engine_loader.starting.held import HeldHere, MayAdopt
from engine_loader.starting.peers import Peers
from engine_loader.starting.reading import Fallback, check_fallback
from engine_loader.starting.seed import Seed
from engine_loader.starting.seeded import Seeded
from engine_loader.starting.start import Start
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.shards import Shard, all_in_boxes
from engine_registry import ModelIdentity, Place, Registry
from engine_registry.errors import InvalidField
from engine_registry.schema.keys import check_instance, check_rank
from engine_registry.schema.numbers import seconds

_REFUSED = {
    "version": "say the version of the fallback in `publish`; peers may serve any",
    "contents": "leave it out: a fallback has no content that is known before",
}


def load_or_seed(
    registry: Registry,
    engine: Engine,
    model: ModelIdentity,
    tensors: Mapping[str, torch.Tensor] | Callable[[], Mapping[str, torch.Tensor]],
    *,
    rank: int,
    world_size: int,
    instance: str,
    fallback: Fallback,
    shards: Mapping[str, Shard] | None = None,
    topology: Mapping[str, tuple[int, int]] | None = None,
    timeout_s: float = 600.0,
    without_etcd_s: float = 30.0,
    required: bool = False,
    publish_later: bool = False,
    adopt: MayAdopt = True,
    allocate: Callable[[], object] | None = None,
    load: LoadOptions = LoadOptions(),
    publish: PublishOptions = PublishOptions(),
) -> Seeded:
    """Fills the tensors of a rank that starts, from peers or from its fallback, and publishes them.

    If a rank like it has ended on this host, and its weights are held (`PublishOptions.hold_s`),
    the tensors get that memory, and nothing is copied; see `adopt`.

    If a rank like it is ready somewhere, the weights come from there: one of the same model, rank,
    world size and topology. Where all tensors say which part of the whole they are, any instance of
    the model is enough. Else one process reads them by its fallback. All others that start with
    this rank of the model load from that process when it is complete, and from each other
    meanwhile.

    Where peers cannot be loaded from, the fallback reads instead, with a warning. A rank that waits
    reads on its own after `timeout_s`, or after `without_etcd_s` without etcd, or at once if etcd
    refuses it: an engine that can start from its disk does. That holds from the first look on, also
    for a registry that is connected with `lazy`. Such a rank is published after the read if etcd
    takes it by then. Nothing stays published if the call raises.

    Args:
        registry: Finds the peers, and is where the rank is registered.
        engine: Reads the peers' memory, and serves that of the tensors.
        model: The model that the rank runs.
        tensors: The tensors to fill in place, by name. Or a function that makes them, for an engine
            whose peers serve other tensors than its fallback fills: it is called when there are
            peers to load from, or files to read. Such tensors come from the same rank of the same
            layout. With a function in `fallback`, they need `publish_later`.
        rank: The world rank of this process in the instance, from 0.
        world_size: How many ranks the instance has, over all parallel axes.
        instance: The name of the instance to publish in.
        fallback: Safetensors files, an index or a folder of them, with whole tensors or with this
            rank's parts. They may hold more tensors. Or a function without arguments that fills all
            of the tensors in place, such as the engine's own loader of checkpoints. It is called
            at most once, in the calling thread. A load from peers that failed may have filled a
            part of the tensors before.
        shards: Which part of the whole a tensor is, by name.
        topology: The place of the rank along each parallel axis: (index, size) by axis.
        timeout_s: How many seconds to wait for peers before the rank reads on its own.
        without_etcd_s: How many seconds to wait for an etcd that is away before that. A restart or
            a new leader of etcd takes less than 30 s. The first look at etcd takes up to the
            `timeout_s` of the registry, if that is longer.
        required: Whether etcd is required. Its error is raised then where it is away for so long,
            or does not register the rank. A refused turn to read alone is not such an error.
        publish_later: Leaves the publication to `Seeded.publish`, which may publish other tensors:
            those that the engine makes of the loaded ones. A rank that has read keeps its turn
            until then, for at most `timeout_s`, so that the others wait for what it publishes.
            This call and its result keep no memory of the tensors.
        adopt: Whether the tensors may be given memory that is held on this host, or a function of
            them that says so. Say False where something knows their addresses already. A
            Destination is never given other memory.
        allocate: Gives memory to those of the tensors that are on the meta device, which stay the
            same objects. It is called where nothing is adopted, before peers or the fallback fill
            the tensors.
        load: How to load from peers; see LoadOptions. Without `version` and `contents`. Its
            `progress` and `cancel` also hold for reads of files. A function has no progress, and
            takes its time: if `cancel` is set meanwhile, Cancelled is raised when it returns.
        publish: How to publish; see PublishOptions. Its `version` is that of what the fallback
            reads, which may be older than that of peers.

    Returns:
        Where the weights came from, and the publication. The caller closes it, also where nothing
        is published yet.

    Raises:
        WeightsFileInvalid: No peer has the weights, and a file cannot be read.
        WeightsMismatch: No peer has the weights, and the files do not have the tensors.
        Cancelled: `load.cancel` was set.
        LoaderError: TensorsUnusable, EngineFailed or MemoryInUse, as `publish` raises them.
            TensorsUnusable also where a function gave tensors other memory.
        Exception: Whatever a function in `fallback` raises. The next process reads then.
        EtcdError: Etcd is `required`, and was away for `without_etcd_s`, or does not register
            the rank.
        RegistryError: InvalidField, RankConflict, InstanceMismatch or KeeperFailed, as `publish`
            raises them.
    """
    check_fallback(fallback)
    check_instance(instance)
    rank, world_size = check_rank(rank, world_size)
    timeout_s = seconds("timeout_s", timeout_s)
    without_etcd_s = seconds("without_etcd_s", without_etcd_s)
    refuse(load, "load_or_seed", _REFUSED)
    place = Place(rank, world_size, topology or {})
    of_peers = cache(lambda: tensors() if callable(tensors) else tensors)

    @cache
    def for_peers() -> Destination:
        if allocate is not None:
            allocate()
        return Destination.of(of_peers(), shards)

    for_fallback, has_boxes = for_peers, False
    if not callable(tensors):
        have_memory = allocate is None or isinstance(tensors, Destination)
        has_boxes = for_peers().has_boxes if have_memory else all_in_boxes(tensors, shards)
    elif callable(fallback):
        if not publish_later:
            raise InvalidField(
                "what to publish after the function in `fallback` is not known, as `tensors` is a "
                "function, too",
                "pass `publish_later=True`, and give the tensors to `Seeded.publish`",
                field="tensors",
            )
        for_fallback = cache(lambda: Destination({}))  # it fills others, which are not known
    seed = Seed(
        registry=registry,
        engine=engine,
        model=model,
        rank=rank,
        world_size=world_size,
        replica=Replica(instance, rank, world_size, place.topology, replace(publish, version=None)),
        version=publish.version or 0,
        required=required,
    )
    held = HeldHere(
        seed=seed,
        tensors=of_peers,
        shards=shards,
        may_adopt=adopt,
        verify=load.verify != "header",
        publish_later=publish_later,
    )
    start = Start(
        peers=Peers(registry, model, place, has_boxes),
        seed=seed,
        held=held,
        for_peers=for_peers,
        for_fallback=for_fallback,
        fallback=fallback,
        options=replace(load, cancel=load.cancel or threading.Event()),
        began=time.monotonic(),
        timeout_s=timeout_s,
        without_etcd_s=without_etcd_s,
        publish_later=publish_later,
    )
    return start.fill()
