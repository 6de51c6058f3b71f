"""The steps of a snapshot: in the memory of the ring, and in the record of its rank.

Used by `publishing.served`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from engine_loader.publishing.releases import Releases, choose_slot
from engine_loader.publishing.slots import Slot
from engine_loader.publishing.snapshots import SnapshotRing
from engine_registry import (
    Manifest,
    RankRecord,
    Registration,
    RegistrationState,
    Registry,
    failpoints,
)
from engine_registry.errors import EtcdError, InvalidField
from engine_registry.schema.record import check_version
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


def make_snapshot(
    registry: Registry,
    registration: Registration,
    releases: Releases,
    ring: SnapshotRing,
    manifest: Manifest,
    version: int | None,
    changed: Iterable[str] | None,
    wait: bool,
) -> int:
    """As `Publication.snapshot`. Nothing else changes the ring or the record meanwhile."""
    before = registration.record
    copied = ring.copied(changed)
    version = next_version(before, version)
    ring.weights.check_in_place(
        f"tensors of {before.key} have other memory than when they were published, so there "
        "is no snapshot of them",
        "copy into them in place, or publish them again",
    )
    slot, is_read = choose_slot(registry, releases, ring, registration)
    if is_read:
        _wait_for_readers(registry, registration, ring, slot)
    if slot.version is not None:
        ring.withhold(slot)
    ring.fill(slot, copied)

    def reveal() -> None:
        failpoints.reach("snapshot.before_reveal")
        made = ring.reveal(slot, version, manifest)
        registration.switch(made, ring.retained())

    if wait:
        reveal()
    else:
        ring.begin(reveal)
    return version


def next_version(before: RankRecord, version: int | None) -> int:
    """One more than the rank has, or the one that is given. InvalidField unless it is newer."""
    version = before.version + 1 if version is None else check_version(version)
    if version <= before.version:
        raise InvalidField(
            f"version {version} is not newer than {before.version}, which {before.key} has",
            "leave `version` out, or say a greater number",
            field="version",
        )
    return version


def _wait_for_readers(
    registry: Registry, registration: Registration, ring: SnapshotRing, slot: Slot
) -> None:
    """Of what is in the slot, to which nobody is invited any more."""
    record = registration.record
    try:
        left_s = ring.retain_s - (time.monotonic() - (slot.until or 0.0))
        if registration.state is RegistrationState.REGISTERED:
            pulls = registry.wait_for_no_pulls(
                record.instance, record.rank, max(0.0, left_s), slot.content
            )
            if pulls:
                log.warning(
                    "%s overwrites version %d, from which %d loads still read after %.3g s",
                    record.key,
                    slot.version,
                    pulls,
                    ring.retain_s,
                    extra=fields("snapshot_overwritten", key=record.key, pulls=pulls),
                )
    except EtcdError as exc:
        log.info(
            "%s overwrites version %d without waiting for its readers: %s",
            record.key,
            slot.version,
            exc,
            extra=fields("snapshot_not_awaited", key=record.key, error=exc),
        )
