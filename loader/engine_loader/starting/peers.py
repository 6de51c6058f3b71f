"""Ranks that run the same rank of the same model and may be loaded from, without those that this
process has tried in vain.

Used by `starting.start`. Starts no thread.
"""

from __future__ import annotations

from collections.abc import Iterable

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
from engine_registry.schema.record import GATEWAY


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
