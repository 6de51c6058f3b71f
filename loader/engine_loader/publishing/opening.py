"""Opens a publication: registers the memory, writes the header, and only then the record.

Used by `publish`, by loads that publish what they fill, and by reads of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch

from engine_loader import metrics
from engine_loader.digests.table import DigestCell, algorithm_for
from engine_loader.engines.base import Engine, offer, with_regions
from engine_loader.errors import TensorsUnusable, listed
from engine_loader.options import PublishOptions
from engine_loader.planning.content import content_of
from engine_loader.publishing.header import Header, HeaderCell
from engine_loader.publishing.publication import Publication
from engine_loader.tensors.cuda import can_be_opened_by_others, to_register, wait_for
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.state_dict import encode_values
from engine_loader.tensors.uses import USES, Use
from engine_registry import ModelIdentity, RankState, Registry, new_incarnation
from engine_registry.schema.record import new_content
from engine_registry.telemetry.metrics import enabled


def open_publication(
    registry: Registry,
    engine: Engine,
    weights: Destination,
    *,
    instance: str,
    rank: int,
    world_size: int,
    model: ModelIdentity,
    topology: Mapping[str, tuple[int, int]] | None,
    options: PublishOptions,
    block_nbytes: int = 0,
    content: str | None = None,
    filled_by: Use | None = None,
) -> Publication:
    """As `publish`. With `filled_by`, the load that fills the weights, the rank is registered as
    loading.

    Nothing of it can be read then but the blocks of `block_nbytes` that are marked, and no digests
    before it is complete. `content` is the one that is being loaded, where its source has stated
    it.
    """
    values = encode_values(options.values or {})
    version = options.version or 0
    tensors = weights.parts
    _check_can_be_served(engine, tensors)
    manifest = replace(weights.manifest, values=values, block_nbytes=block_nbytes)
    device = weights.devices[0]
    table = DigestCell(tensors, device, algorithm_for(device)) if options.digests else None
    incarnation = new_incarnation()
    with ExitStack() as undo:
        use = USES.serve(f"{instance}/{rank}", weights.runs, filled_by)
        undo.callback(USES.end, use)
        manifest = with_regions(manifest, offer(engine, undo, *manifest.regions))
        header = HeaderCell(device, manifest.marks)
        offer(engine, undo, to_register(header.region, device.type))
        proven = None
        if table is not None:
            offer(engine, undo, to_register(table.region, device.type))
            manifest = replace(manifest, digests=table.table)
            if filled_by is None:
                proven = content_of(manifest, table.write(tensors), table.table.algorithm)
        wait_for(weights.devices)  # readers do not know of streams
        content = content or proven or new_content()
        header.write(Header(incarnation, 2 * version, content))
        undo.callback(header.retire)
        registration = registry.register(
            instance=instance,
            rank=rank,
            world_size=world_size,
            model=model,
            manifest=manifest,
            session_id=engine.session_id,
            protocol=engine.protocol,
            fabric=engine.fabric,
            header_addr=header.region.addr,
            incarnation=incarnation,
            generation=options.generation,
            topology=topology,
            version=version,
            content=content,
            state=RankState.READY if filled_by is None else RankState.LOADING,
            device=str(device),
            ttl_s=options.ttl_s,
            on_state=options.on_state,
        )
        undo.callback(registration.withdraw)
        if enabled():  # it costs a watch in etcd
            undo.enter_context(registry.watch_pulls(registration.record, metrics.on_pull))
        return Publication(
            registry, registration, header, table, weights, manifest.regions, use, undo.pop_all()
        )


def _check_can_be_served(engine: Engine, tensors: Mapping[str, torch.Tensor]) -> None:
    if engine.protocol != "nvlink_intra":
        return
    closed = [
        name
        for name, tensor in tensors.items()
        if tensor.numel()
        and not (tensor.is_cuda and can_be_opened_by_others(tensor.untyped_storage().data_ptr()))
    ]
    if closed:
        raise TensorsUnusable(
            f"{len(closed)} tensors cannot be opened by other processes over NVLink, which takes "
            "memory of cudaMalloc, not the host's, nor expandable segments "
            f"(PYTORCH_CUDA_ALLOC_CONF): {listed(closed)}",
            "move them, or use rdma or tcp",
            problems=closed,
        )
