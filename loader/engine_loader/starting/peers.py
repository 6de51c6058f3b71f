"""Ranks that run the same rank of the same model and may be loaded from, without those that this
process has tried in vain.

Used by `starting.start`; `find_peers` is the question of an engine. Starts no thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from engine_registry import (
    Event,
    InstanceReady,
    InstanceState,
    InstanceStatus,
    ModelIdentity,
    Place,
    RankJoined,
    RankRecord,
    RankState,
    RankUpdated,
    Registry,
)
from engine_registry.errors import EtcdError
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
        """As etcd has them. Raises EtcdError where it cannot be asked."""
        return [record for status in self._registry.instances() for record in self._of(status)]

    def are_in(self, event: Event) -> bool:
        """Whether the event says that there is one now."""
        if isinstance(event, RankJoined | RankUpdated):
            return self._is_like(event.record)
        return isinstance(event, InstanceReady) and bool(self._of(event.status))

    def give_up(self, records: Iterable[RankRecord]) -> None:
        """They could not be loaded from."""
        self._failed.update(record.incarnation for record in records)

    def pass_by(self, records: Iterable[RankRecord]) -> None:
        """They have changed since: they are tried again once their records change once more."""
        self._passed_by.update((record.incarnation, record.mod_revision) for record in records)

    def _of(self, status: InstanceStatus) -> list[RankRecord]:
        whole = self._boxes and status.state is InstanceState.READY and status.model == self._model
        return [
            record
            for record in status.records
            if (self._may_be_tried(record) if whole else self._is_like(record))
        ]

    def _is_like(self, record: RankRecord) -> bool:
        is_same = record.model == self._model and self._place.fits(Place.of(record))
        return is_same and record.state is RankState.READY and self._may_be_tried(record)

    def _may_be_tried(self, record: RankRecord) -> bool:
        passed_by = (record.incarnation, record.mod_revision) in self._passed_by
        return (
            record.incarnation not in self._failed and not passed_by and record.kept_by != GATEWAY
        )
