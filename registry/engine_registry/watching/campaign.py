"""How a process campaigns for `/elections/<name>/leader`, and leads while it holds that key.

The key is under a lease of the campaign, or, once the leader is registered and says so, of its
registration. Used by `watching.election`. Starts one thread, which holds no reference to the
election, so an election that is forgotten can be collected.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Sequence

from engine_registry.errors import EtcdError, EtcdRefused, LeaseNotFound, RecordDamaged
from engine_registry.etcd.backoff import Backoff
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.schema.keys import election_key
from engine_registry.schema.keyvalue import (
    Delete,
    Guard,
    KeyValue,
    Put,
    Snapshot,
    absent,
    unchanged,
    written,
)
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import decode_item
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_TTL_S = 5.0  # how long the others wait for a leader whose host has died
_GIVE_BACK_S = 1.0  # an etcd that takes longer to revoke the lease lets it expire
_JOIN_S = 1.0


class Campaign:
    """From `start` to `close`. Leading is believed only while the lease surely lives."""

    def __init__(self, etcd: Etcd, name: str) -> None:
        """`etcd` is for this campaign alone, which closes it at the end: so that it need not wait
        for a call.
        """
        self._etcd = etcd
        self._key = election_key(name)
        self._leads_until = 0.0
        self.refusal: EtcdRefused | None = None  # why this process cannot lead
        self._unreachable_since: float | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._follower: Follower | None = None
        self._ours: KeyValue | None = None  # our key, as it was written last
        self._kept_until = 0.0  # by another lease than the campaign's, such as a registration's
        self._renewing = threading.Lock()  # held while it is looked at whose the key is, or changed
        self._thread = threading.Thread(target=self._run, name=f"election {name}", daemon=True)

    @property
    def leading(self) -> bool:
        """Whether this process leads now, by its own clock; never longer than its lease lives."""
        return time.monotonic() < max(self._kept_until, self._leads_until)

    @property
    def unreachable_since(self) -> float | None:
        """When etcd was lost, on the clock of time.monotonic; None while it can be reached, as far
        as is known. Until etcd has answered for the first time, when the campaign began.
        """
        follower = self._follower
        since = [self._unreachable_since, follower.away_since if follower is not None else None]
        return min((one for one in since if one is not None), default=None)

    def keep_with(self, record: RankRecord) -> bool:
        """From now on we lead for as long as this registration of ours is held, or until `close`;
        False if we do not lead.

        Its keeper renews the lease whatever our threads do, and ends it as soon as our process has
        ended.
        """
        with self._renewing:
            found = self._etcd.get(record.key)
            if found is None or self._ours is None or not self.leading or not _is_of(found, record):
                return False
            if not self._move(self._ours, found.lease_id, [unchanged(found)]):
                return False
            self._kept_until = math.inf
            self._stopped.set()
            return True

    def keep_for(self, ttl_s: float) -> bool:
        """The registration that keeps the lead may end from now on: we lead for `ttl_s`, or until
        `close`. False if no registration of ours keeps the lead.
        """
        with self._renewing:
            if self._ours is None or not self._kept_until:
                return False
            granted_at = time.monotonic()
            if not self._move(self._ours, self._etcd.grant(ttl_s)):
                return False
            self._kept_until = granted_at + ttl_s
            return True

    def _move(self, ours: KeyValue, lease_id: int, guards: Sequence[Guard] = ()) -> bool:
        """Puts our key under that lease, if it is still ours."""
        put = Put(self._key, _me(), lease_id)
        revision = self._etcd.commit([unchanged(ours), *guards], [put])
        if not revision:
            # a first try may have succeeded, whose answer was lost
            found = self._etcd.get(self._key)
            is_done = found is not None and found.lease_id == lease_id
            revision = found.mod_revision if found is not None and is_done else 0
        if revision:
            self._ours = written(put, revision, ours)
        return bool(revision)

    def start(self) -> None:
        """Begins to campaign, in a thread."""
        self._unreachable_since = time.monotonic()
        self._thread.start()

    def close(self) -> None:
        """Stops campaigning; if we lead, the next one takes over at once."""
        with self._lock:
            self._stopped.set()
            if self._follower is not None:
                self._follower.stop()
        if self._kept_until:
            self._let_go()
        for patience_s in (_GIVE_BACK_S, _JOIN_S):
            if self._thread.is_alive():
                self._thread.join(timeout=patience_s)
            self._etcd.close()

    def _let_go(self) -> None:
        self._kept_until = 0.0
        try:
            if self._ours is not None:
                self._etcd.commit([unchanged(self._ours)], [Delete(self._key)])
        except EtcdError as exc:
            log.info(
                "%s goes with its lease: %s",
                self._key,
                exc,
                extra=fields("election_left", key=self._key, error=exc),
            )

    def _run(self) -> None:
        backoff = Backoff()
        while not self._stopped.is_set():
            try:
                self._wait_until_vacant()
                # the lease may be older than the answer, never younger
                granted_at = time.monotonic()
                lease_id = self._etcd.grant(_TTL_S)
                try:
                    put = Put(self._key, _me(), lease_id)
                    revision = self._etcd.commit([absent(self._key)], [put])
                    self.refusal = self._unreachable_since = None
                    if revision:
                        self._ours = written(put, revision)
                        self._lead(lease_id, granted_at)
                finally:
                    self._leads_until = 0.0
                    self._etcd.revoke(lease_id)
                backoff.reset()
            except EtcdError as exc:
                self._note(exc)
                self._stopped.wait(backoff.next_s())

    def _note(self, exc: EtcdError) -> None:
        """An outage passes, and a refusal as a rule does not: it is logged once, as the reason why
        nothing is done.
        """
        if self._unreachable_since is None:
            self._unreachable_since = time.monotonic()
        if isinstance(exc, EtcdRefused) and self.refusal is None and not self._stopped.is_set():
            log.warning(
                "this process does not lead, and does nothing that only a leader does: %s",
                exc,
                extra=fields("election_refused", key=self._key, error=exc),
            )
            self.refusal = exc
        else:
            log.info(
                "campaigning for %s again soon: %s",
                self._key,
                exc,
                extra=fields("election_retry", key=self._key, error=exc),
            )

    def _wait_until_vacant(self) -> None:
        follower = Follower(self._etcd, self._key)
        with self._lock:
            self._follower = follower
            if self._stopped.is_set():
                return
        for update in follower:
            self._unreachable_since = None
            taken = update.items if isinstance(update, Snapshot) else self._etcd.get(self._key)
            if not taken:
                follower.stop()

    def _lead(self, lease_id: int, renewed_at: float) -> None:
        self._leads_until = renewed_at + _TTL_S
        while not self._stopped.wait(_TTL_S / 3):
            renewed_at = time.monotonic()
            try:
                with self._renewing:
                    if self._kept_until:
                        return
                    held = self._etcd.get(self._key)
                    if held is None or held.lease_id != lease_id:
                        log.info(
                            "%s is not ours any more: campaigning again",
                            self._key,
                            extra=fields("election_lost", key=self._key),
                        )
                        return
                    lives_s = self._etcd.keep_alive(lease_id)
            except LeaseNotFound:
                return
            except EtcdError as exc:
                log.info(
                    "leading %s in doubt: %s",
                    self._key,
                    exc,
                    extra=fields("election_doubt", key=self._key, error=exc),
                )
                if not self.leading:
                    return
            else:
                self._leads_until = renewed_at + min(_TTL_S, lives_s)


def _is_of(item: KeyValue, record: RankRecord) -> bool:
    try:
        return decode_item(item).incarnation == record.incarnation
    except RecordDamaged:
        return False


def _me() -> bytes:
    return f"{socket.gethostname()}:{os.getpid()}".encode()
