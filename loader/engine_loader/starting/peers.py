"""Ranks that run the same rank of the same model and may be loaded from, without those that this
process has tried in vain.

Used by `starting.start`; `find_peers` is the question of an engine. Starts no thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from engine_registry import (
    InstanceStatus,
    ModelIdentity,
    Place,
    RankRecord,
    RankState,
    Registry,
)
from engine_registry.errors import EtcdError, InstanceIncomplete, InstanceNotFound
from engine_registry.holders.query import HolderQuery
from engine_registry.holders.waiting import HolderWatch
from engine_registry.schema.keys import check_rank
from engine_registry.schema.record import GATEWAY
from engine_registry.schema.topology import check_topology
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


def find_peers(
    registry: Registry,
    model: ModelIdentity,
    *,
    rank: int,
    world_size: int,
    topology: Mapping[str, tuple[int, int]] | None = None,
    boxes: bool = False,
) -> tuple[RankRecord, ...]:
    """Ranks that `load_or_seed` with these arguments would load from now.

    It is one look at etcd, for an engine that prepares differently for peers and for its disk. The
    peers may be gone a moment later, or new ones come. `load_or_seed` looks for itself.

    Args:
        registry: Where to look.
        model: The model that the rank runs.
        rank: The world rank of this process in its instance, from 0.
        world_size: How many ranks the instance has, over all parallel axes.
        topology: The place of the rank along each parallel axis: (index, size) by axis.
        boxes: Whether all tensors of the rank say which part of the whole they are. Any instance of
            the model that is ready counts then.

    Returns:
        The records of the ranks. Empty where there are none, and where etcd is away or refuses,
        which takes up to the `timeout_s` of the registry: an engine reads its disk then.

    Raises:
        InvalidField: An argument is not valid; `details["field"]` names it.
    """
    place = Place(*check_rank(rank, world_size), check_topology(topology or {}))
    try:
        return tuple(Peers(registry, model, place, boxes).now())
    except EtcdError as exc:
        note_unknown(model, exc)
        return ()


def note_unknown(model: ModelIdentity, error: EtcdError) -> None:
    """Logs that etcd could not be asked."""
    log.info(
        "it is not known which ranks have %s: %s",
        model,
        error,
        extra=fields("sources_unknown", error=error),
    )


class Peers:
    def __init__(
        self,
        registry: Registry,
        model: ModelIdentity,
        place: Place,
        boxes: bool,
    ) -> None:
        """`boxes`: what is loaded says which part of the whole it is, so that an instance of any
        layout will do.
        """
        self._registry = registry
        self._model = model
        self._place = place
        self._boxes = boxes
        self._failed: set[str] = set()  # incarnations
        self._passed_by: set[tuple[str, int]] = set()  # and revisions

    def now(self) -> list[RankRecord]:
        """Some of them, as etcd has them. Raises EtcdError where it cannot be asked."""
        query = HolderQuery(self._model, self._place, self._is_like)
        like = [
            record for record in self._registry.find_holders(query).ready if self._is_like(record)
        ]
        if like or not self._boxes:
            return like
        try:
            ready = self._registry.ready(self._model, usable=lambda one: bool(self._of(one)))
        except (InstanceNotFound, InstanceIncomplete):
            return []
        return [record for status in ready for record in self._of(status)]

    def watch(self) -> HolderWatch:
        """Says when there may be one that was not there before."""
        rank = None if self._boxes else self._place.rank
        return self._registry.watch_holders(self._model, rank)

    def give_up(self, records: Iterable[RankRecord]) -> None:
        """They could not be loaded from."""
        self._failed.update(record.incarnation for record in records)

    def pass_by(self, records: Iterable[RankRecord]) -> None:
        """They have changed since: they are tried again once their records change once more."""
        self._passed_by.update((record.incarnation, record.mod_revision) for record in records)

    def _of(self, status: InstanceStatus) -> list[RankRecord]:
        return [record for record in status.records if self._may_be_tried(record)]

    def _is_like(self, record: RankRecord) -> bool:
        is_same = record.model == self._model and self._place.fits(Place.of(record))
        return is_same and record.state is RankState.READY and self._may_be_tried(record)

    def _may_be_tried(self, record: RankRecord) -> bool:
        passed_by = (record.incarnation, record.mod_revision) in self._passed_by
        return (
            record.incarnation not in self._failed and not passed_by and record.kept_by != GATEWAY
        )
