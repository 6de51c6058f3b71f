"""Finds ranks whose memory is held on this host, or can be shared. Used by `adopt` and starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from engine_loader.errors import EngineFailed
from engine_loader.publishing.holding import name_of
from engine_loader.sharing.pieces import Pieces, is_by_descriptors
from engine_registry import Manifest, ModelIdentity, RankRecord, RankState, Registry
from engine_registry.registration.descriptors import DescriptorPlace
from engine_registry.registration.held import Kept, keepers_here
from engine_registry.schema.keys import check_rank
from engine_registry.schema.topology import check_topology


@dataclass(frozen=True)
class HeldRank:
    """A rank of this host whose weights can be adopted, or shared.

    Attributes:
        record: Its record; see `RankRecord.held`.
        manifest: What it has published.
        kept: What its keeper says.
    """

    record: RankRecord
    manifest: Manifest
    kept: Kept

    @property
    def place(self) -> DescriptorPlace:
        """Where its keeper hands descriptors out."""
        return _places_of(self.manifest)[0]


def find_held(
    registry: Registry,
    model: ModelIdentity,
    *,
    rank: int,
    world_size: int,
    topology: Mapping[str, tuple[int, int]] | None = None,
    device: torch.device | None = None,
) -> HeldRank | None:
    """Finds a rank of this host whose process has ended, and whose keeper holds its memory.

    Only keepers of this user are seen, in this network namespace. Etcd is asked only where one of
    them holds something.

    Args:
        registry: Where the rank was registered.
        model: The model.
        rank: The world rank, from 0.
        world_size: How many ranks its instance had, over all parallel axes.
        topology: The place of the rank along each parallel axis, as it was published.
        device: Where the memory lies: a GPU with its number, or the host. None: anywhere.

    Returns:
        Of several, in whichever instances, the one that was registered last. None where there is
        none.

    Raises:
        InvalidField: An argument is not valid; `details["field"]` names it.
        EtcdError: Etcd cannot be reached, or refuses.
    """
    for found in find_each(registry, model, rank, world_size, topology, shared=False):
        if device is None or name_of(device) in found.kept.devices:
            return found
    return None


def find_each(
    registry: Registry,
    model: ModelIdentity,
    rank: int,
    world_size: int,
    topology: Mapping[str, tuple[int, int]] | None,
    shared: bool,
) -> Iterator[HeldRank]:
    """As `find_held`, the one that was registered last comes first. If they can be `shared`, also
    those that live and are ready.
    """
    rank, world_size = check_rank(rank, world_size)
    wanted = (model, rank, world_size, check_topology(topology or {}))
    found: list[tuple[RankRecord, Kept]] = []
    for kept in keepers_here():
        if not (kept.held or shared):
            continue
        record = registry.record_at(kept.key)
        if record is None or record.incarnation != kept.incarnation or not _is_there(kept, record):
            continue
        if (record.model, record.rank, record.world_size, dict(record.topology)) == wanted:
            found.append((record, kept))
    for record, kept in sorted(found, key=lambda each: each[0].began, reverse=True):
        (manifest,) = registry.manifests([record])
        if isinstance(manifest, Manifest) and _is_kept(manifest, kept):
            yield HeldRank(record, manifest, kept)


def _is_there(kept: Kept, record: RankRecord) -> bool:
    """A keeper may hold what it has not written into the record yet, as while etcd is away."""
    if kept.held:
        return record.held or not record.ended
    return not record.ended and record.state is RankState.READY


def _is_kept(manifest: Manifest, kept: Kept) -> bool:
    try:
        return any(place.name == kept.name for place in _places_of(manifest))
    except EngineFailed:
        return False


def _places_of(manifest: Manifest) -> list[DescriptorPlace]:
    exports = filter(is_by_descriptors, manifest.exports)
    return [Pieces.decode(export).place for export in exports]
