"""Opens a publication: offers the memory, and only then writes the record.

Used by `publish`, by loads that publish what they fill, and by reads of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from engine_loader.engines.base import Engine
from engine_loader.options import PublishOptions, Snapshots
from engine_loader.publishing.holding import descriptors_of, hold_for
from engine_loader.publishing.offering import meter_pulls, offer_weights
from engine_loader.publishing.publication import Publication
from engine_loader.publishing.served import Served
from engine_loader.publishing.snapshots import offer_snapshots
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.uses import Use
from engine_registry import ModelIdentity, RankState, Registry


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
    expected: Mapping[str, bytes] | None = None,
    replaces: str = "",
) -> Publication:
    """As `publish`. With `filled_by`, the load that fills the weights, the rank is registered as
    loading.

    Nothing of it can be read then but the blocks of `block_nbytes` that are marked, and no digests
    before it is complete. `content` is the one that is being loaded, where its source has stated
    it. DigestMismatch names the tensors whose digests are not the `expected` ones. `replaces` is
    the incarnation of a rank whose memory was adopted: etcd may not know of its end yet.
    """
    version = options.version or 0
    with ExitStack() as guard:
        undo = guard.enter_context(ExitStack())
        owner = f"{instance}/{rank}"
        ring = None
        if isinstance(options.snapshots, Snapshots):
            offering, ring = offer_snapshots(
                engine,
                weights,
                undo,
                owner=owner,
                options=options,
                snapshots=options.snapshots,
                version=version,
            )
        else:
            offering = offer_weights(
                engine,
                weights,
                undo,
                owner=owner,
                options=options,
                version=version,
                block_nbytes=block_nbytes,
                content=content,
                filled_by=filled_by,
                expected=expected,
            )
        registration = registry.register(
            instance=instance,
            rank=rank,
            world_size=world_size,
            model=model,
            manifest=offering.manifest,
            session_id=engine.session_id,
            protocol=engine.protocol,
            fabric=engine.fabric,
            rails=engine.rails,
            location=engine.location,
            header_addr=offering.header.region.addr,
            incarnation=offering.incarnation,
            generation=options.generation,
            topology=topology,
            version=version,
            content=offering.content,
            state=RankState.READY if filled_by is None else RankState.LOADING,
            device=str(offering.device),
            labels=options.labels,
            ttl_s=options.ttl_s,
            unresponsive_after_s=options.unresponsive_after_s,
            on_state=options.on_state,
            descriptors=descriptors_of(engine, offering.manifest.exports),
            hold=hold_for(weights, options),
            replaces=replaces,
        )
        guard.callback(registration.withdraw)
        meter_pulls(registry, registration.record, undo)
        publication = Publication(Served(registry, engine, registration, offering, options, ring))
        guard.pop_all()  # the publication closes all of it
        return publication
