"""What a publication has to do with the released version of its instance: it releases versions,
keeps its release standing, and knows which of its snapshots must stay.

Used by `publishing.served`. A release that is put back is put back in a thread of the registration.
"""

from __future__ import annotations

import logging
import threading

from engine_loader.errors import NoFreeSnapshot
from engine_loader.publishing.slots import Slot
from engine_loader.publishing.snapshots import SnapshotRing
from engine_registry import Registration, RegistrationState, Registry, Release, failpoints
from engine_registry.errors import EtcdError, RegistryError
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_KEEP_S = 60.0  # for the other ranks of the instance to be back, too


class Releases:
    """Of one registration. It holds no reference to the publication, which may be forgotten."""

    def __init__(self, registry: Registry, registration: Registration) -> None:
        self._registry = registry
        self._rank = registration.record.rank
        self._instance = registration.record.instance
        self._lock = threading.Lock()
        self._made: Release | None = None
        registration.when_claimed_again(self._keep)

    def release(self, version: int, timeout_s: float, back: bool = False) -> Release:
        """Raises what `Registry.release` raises."""
        call = self._registry.rollback if back else self._registry.release
        made = call(self._instance, version, timeout_s, rank=self._rank)
        with self._lock:
            self._made = made
        return made

    def _keep(self) -> None:
        """Its lease may have been lost with the registration, and the release with it."""
        with self._lock:
            made = self._made
        if made is None:
            return
        try:
            self._registry.keep_released(made, _KEEP_S, rank=self._rank)
        except RegistryError as exc:
            log.warning(
                "version %d of %s may not be released any more: %s",
                made.version,
                self._instance,
                exc,
                extra=fields("release_not_kept", instance=self._instance, error=exc),
            )

    def wait_for_another(self, version: int, timeout_s: float) -> None:
        """Raises NoFreeSnapshot where the version is still the released one after that time."""
        if not self._registry.wait_while_released(self._instance, version, timeout_s):
            raise NoFreeSnapshot(
                f"version {version} of {self._instance} is released, so it stays, and after "
                f"{timeout_s:.3g} s there is still no other place for a snapshot",
                "release a newer version before the next snapshot, or keep more of them, as with "
                "`Snapshots(count=3)`",
                version=version,
            )


def choose_slot(
    registry: Registry, releases: Releases, ring: SnapshotRing, registration: Registration
) -> tuple[Slot, bool]:
    """Where the next snapshot goes: not where the released version is, and to the oldest version
    that nobody reads, if there is one. And whether somebody may still read what is in it; nobody
    else is invited to it any more.

    Waits for another release where that is the only place, for `ring.retain_s`, and raises
    NoFreeSnapshot then. A release needs the version in the records of all ranks. So it is taken out
    of ours first, and then looked at once more: either a rollback to it came before, and it stays,
    or none can come any more. The same holds for tickets.
    """
    try:
        while registration.state is RegistrationState.REGISTERED:  # else nobody can be asked
            if (slot := ring.next()).version is None:
                return slot, False
            released, read = registry.uses_of(registration.record)
            slot = ring.next(but=released, read=read)
            if released is not None and slot.version == released:  # there is no other
                releases.wait_for_another(released, ring.retain_s)
                continue
            failpoints.reach("snapshot.slot_chosen")
            registration.update(retained=ring.retained(but=slot))
            failpoints.reach("snapshot.slot_withdrawn")
            released, read = registry.uses_of(registration.record)
            if released != slot.version:
                return slot, not read.isdisjoint({slot.content, ""})
            registration.update(retained=ring.retained())
    except EtcdError as exc:
        log.info(
            "a snapshot does not ask which version is released: %s",
            exc,
            extra=fields("release_unknown", instance=registration.record.instance, error=exc),
        )
    slot = ring.next()
    registration.update(retained=ring.retained(but=slot))
    return slot, slot.version is not None
