"""One registration's lease and keys in etcd, held through expiry and outage as the rank wants them.

Run by `registration.keeper.main` in a process beside the rank. Starts no thread but that of the
key's watch.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from engine_registry.errors import (
    EtcdError,
    EtcdRefused,
    Evicted,
    LeaseNotFound,
    RecordDamaged,
    RegistrationLost,
    RegistryError,
    Superseded,
)
from engine_registry.etcd.backoff import Backoff
from engine_registry.etcd.client import Etcd
from engine_registry.registration.eviction import why_gone
from engine_registry.registration.keeper.key_watch import KeyWatch
from engine_registry.registration.keeper.protocol import FORMER_KEPT, beat_s
from engine_registry.registration.writes import DIED, amend, claim, end, remove
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import decode_item, encode
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)

# From one look at the key to the next while its watch has nothing to tell: a member of etcd that
# renews leases may be far behind the others, and then its watches are, too.
LOOK_EVERY_S = 60.0

Report = Callable[[dict[str, Any]], None]


class Keeper:
    """Not thread-safe: one thread drives it."""

    def __init__(
        self,
        etcd: Etcd,
        record: RankRecord,
        parts: Sequence[bytes],
        ttl_s: float,
        report: Report,
        watch: KeyWatch,
        former: Sequence[str] = (),
        replaces: str = "",
    ) -> None:
        """`watch` is of the record's key. `former` are incarnations that the rank has had: its
        record may stand in etcd under one of them. `replaces` is one of another process, which has
        ended, whether its record says so yet or not.
        """
        self._etcd = etcd
        self._record = record
        self._parts = parts
        self._former = list(former)
        self._replaces = replaces
        self._moved = False  # the manifest is another, too, than the one in etcd
        self._ttl_s = ttl_s
        self._report = report
        self._watch = watch
        self._looked_at = -math.inf  # at the key, on the clock of time.monotonic
        self._granted_at = -math.inf  # the lease that there is, on the same clock
        self._backoff = Backoff(0.1, 0.5)
        # the record's key as we wrote it last, unless its lease is lost
        self._held: KeyValue | None = None
        self._stale = False  # the rank wants another record than the one in etcd
        self._suspended = False
        # how long etcd took for it in the beat that is going on
        self._renewed_in_s: float | None = None
        self._claims_again = 0

    def register(self) -> None:
        """The first claim: raises what is wrong, and then leaves nothing in etcd."""
        self._granted_at = time.monotonic()
        lease_id = self._etcd.grant(self._ttl_s)
        try:
            self._claim(lease_id)
        except RegistryError:
            self._give_up(lease_id)
            raise

    def beat(self) -> float:
        """Renews the lease and mends what is amiss; returns the seconds until the next beat. Raises
        RegistrationLost only.

        Reports the state every time: so the rank knows that its keeper lives, and need not know the
        reports of a keeper before this one. The report also has the rank's counts: how long the
        renewal took, and how often the record was put into etcd again.
        """
        self._renewed_in_s = None
        try:
            if self._held is not None:
                self._renew(self._held)
            if self._held is None:
                self._claim_again()
            elif self._stale:
                self._amend(self._held)
        except EtcdError as exc:
            self._looked_at = -math.inf  # so that the next beat begins with a look
            self._suspended = True
            self._report({"state": "SUSPENDED", "why": str(exc)})
            return self._backoff.next_s()
        self._suspended = False
        self._report(
            {
                "state": "REGISTERED",
                "why": "",
                "order": self.order,
                "renewed_in_s": self._renewed_in_s,
                "claims_again": self._claims_again,
            }
        )
        self._backoff.reset()
        return beat_s(self._ttl_s)

    @property
    def due_s(self) -> float:
        """Until the first beat: none where there is no lease yet, or its grant was long ago."""
        return max(0.0, self._granted_at + beat_s(self._ttl_s) - time.monotonic())

    def is_quiet(self) -> bool:
        """The record's key is as we wrote it, as far as its watch tells."""
        return self._held is not None and self._watch.is_quiet(self._held.mod_revision)

    @property
    def order(self) -> int:
        """That of the record, since it was claimed."""
        return self._record.order

    @property
    def record(self) -> RankRecord:
        """As the rank wants it to be in etcd."""
        return self._record

    @property
    def suspended(self) -> bool:
        """etcd could not be reached at the last try."""
        return self._suspended

    def change(self, record: RankRecord, parts: Sequence[bytes] = ()) -> None:
        """The next beat writes the record; with `parts`, under another incarnation, and them."""
        if parts:
            self._former.append(self._record.incarnation)
            self._parts, self._moved = parts, True
        self._record, self._stale = replace(record, order=self._record.order), True

    def mark(self, unresponsive_since: str) -> bool:
        """Says in the record since when the rank has not answered, or with an empty text that it
        answers; False where the record says so already. The next beat writes it.
        """
        if bool(self._record.unresponsive_since) == bool(unresponsive_since):
            return False
        self.change(replace(self._record, unresponsive_since=unresponsive_since))
        return True

    def hold(self, until: str) -> None:
        """The rank's process has ended, and its memory is held. The next beat writes that."""
        self.change(replace(self._record, ended=DIED, held_until=until, unresponsive_since=""))

    def end(self, reason: str) -> None:
        """Deletes the registration; EtcdError if that must be tried again."""
        if self._held is not None:
            with contextlib.suppress(LeaseNotFound):
                end(self._etcd, self._held, reason)
        else:  # a keeper before this one, or a write whose answer was lost, may have left it
            for incarnation in (self._record.incarnation, *self._former):
                remove(self._etcd, replace(self._record, incarnation=incarnation), reason)
        self._held = None
        self._watch.end()

    def _renew(self, held: KeyValue, is_doubtful: bool = False) -> None:
        # The key is looked at before the lease is renewed: a lease that lives afterwards lived
        # then, in the same store, so a key that was missing has not expired with it, nor with a
        # store that was wiped in between: somebody deleted it.
        late = time.monotonic() - self._looked_at > LOOK_EVERY_S
        found = self._look() if is_doubtful or late or not self.is_quiet() else held
        start = time.monotonic()
        try:
            self._etcd.keep_alive(held.lease_id)
        except LeaseNotFound:
            self._held = None
            return
        self._renewed_in_s = time.monotonic() - start
        if found is None:
            self._lose(why_gone(self._etcd, self._record, self._former))
        elif (found.mod_revision, found.value) != (held.mod_revision, held.value):
            self._adopt_or_lose(found, held.lease_id)

    def _look(self) -> KeyValue | None:
        """The record's key as it is, which is watched from then on."""
        self._looked_at = time.monotonic()
        now = self._etcd.snapshot(self._record.key, exact=True)
        if not self._watch.stands:
            self._watch.begin(now.revision + 1)
        return now.items[0] if now.items else None

    def _adopt_or_lose(self, item: KeyValue, lease_id: int) -> None:
        """The key holds something else than we wrote, as far as we know."""
        key = self._record.key
        try:
            found = decode_item(item)
        except RecordDamaged as exc:
            self._lose(Superseded(f"{exc}; the registration has ended", key=key))
        else:
            if found.incarnation not in (self._record.incarnation, *self._former):
                self._lose(
                    Superseded(f"{key} now belongs to another process ({found.holder})", key=key)
                )
            if found.ended and not found.held:  # which an eviction has put an end to
                self._lose(why_gone(self._etcd, self._record, self._former))
            if item.value == encode(self._record) and item.lease_id == lease_id:
                self._written(item)  # the answer to a write was lost
            else:
                # An old key of ours, as after a restored backup: its manifest may be under an old
                # lease too.
                self._claim_again(lease_id)

    def _claim(self, lease_id: int) -> None:
        held = claim(self._etcd, self._record, self._parts, lease_id, self._replaces, self._former)
        self._written(held)
        self._watch.begin(held.mod_revision + 1)

    def _written(self, held: KeyValue) -> None:
        """etcd has all that the rank wants."""
        self._held = held
        self._record = replace(self._record, order=decode_item(held).order)
        self._stale, self._moved = False, False
        del self._former[:-FORMER_KEPT]

    def _claim_again(self, lease_id: int = 0) -> None:
        """With a lease that there is, or a new one.

        Another keeper of ours was here before, so a refusal is a loss.
        """
        try:
            if lease_id:
                self._claim(lease_id)
            else:
                self.register()
            self._claims_again += 1
        except EtcdError:
            raise
        except Evicted as exc:
            self._lose(exc)
        except RegistryError as exc:
            key = self._record.key
            self._lose(
                Superseded(f"{key} cannot be registered again: {exc.what}", exc.remedy, key=key)
            )

    def _amend(self, held: KeyValue) -> None:
        parts = self._parts if self._moved else ()
        try:
            amended = amend(self._etcd, self._record, held, parts)
        except EtcdRefused:
            if self._record.ended:  # nobody may take it for a rank that lives
                end(self._etcd, held, self._record.ended)
                self._held = None
            raise
        if amended is None:
            # raises if another process was faster; else the answer to a write of ours was lost
            self._renew(held, is_doubtful=True)
            if self._stale:
                raise EtcdError(f"{self._record.key} changed while it was being updated")
            return
        self._written(amended)

    def _lose(self, error: RegistrationLost) -> None:
        self._watch.end()
        if self._held is not None:
            self._give_up(self._held.lease_id)
        self._held = None
        raise error

    def _give_up(self, lease_id: int) -> None:
        try:
            self._etcd.revoke(lease_id)
        except EtcdError as exc:
            log.info(
                "lease %x is left to expire: %s",
                lease_id,
                exc,
                extra=fields("lease_left", error=exc),
            )
