"""The tickets that a load holds while it reads from ranks: for each rank one, which lies at
`/pulls/<instance>/<rank>/<load-id>`, all under one lease of the loader's.

Issued by `pulls.taking`. The loader writes its progress into them.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace

from engine_registry.errors import EtcdError, EtcdUnavailable, LeaseNotFound
from engine_registry.etcd.client import Etcd
from engine_registry.lifetime import Closable
from engine_registry.schema.keyvalue import Put, Range, present
from engine_registry.schema.pull_ticket import Pull, encode
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
TTL_S = 15.0  # how long a loader that died keeps a rank from leaving
_REPORT_S = 5.0  # the least time between two writes of progress
_STEPS = 10  # the most writes of progress: a load that takes an hour writes no more
_AT_ONCE = 64  # tickets in one transaction


class PullTicket(Closable):
    """What a load holds while it reads from a rank, or from several: a ticket for each.

    Held from `Registry.pull` to `close`. Starts one thread, which renews the lease and writes the
    progress that is reported.
    """

    def __init__(self, etcd: Etcd, lease_id: int, pulls: Sequence[Pull]) -> None:
        """`pulls` are at least one. They hang on the lease."""
        self._etcd = etcd
        self._lease_id = lease_id
        self._key = pulls[0].key  # stands for all
        self._written = list(pulls)  # those that etcd has, and takes another for
        self._reported = (pulls[0].nbytes, pulls[0].total_nbytes)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=_keep,
            args=(weakref.ref(self), self._closed),
            name=f"ticket {self._key}",
            daemon=True,
        )
        self._thread.start()
        self._mark_open()

    def report(self, nbytes: int, total_nbytes: int) -> None:
        """How many bytes of how many the load has, for everybody who looks at tickets.

        Never waits. It is written within 5 s, if it is a tenth of the load more than was written.
        """
        self._reported = (nbytes, total_nbytes)

    def _beat(self, renew: bool) -> bool:
        """Writes the progress, and renews the lease if it is time. False: the tickets are gone."""
        try:
            if renew:
                self._etcd.keep_alive(self._lease_id)
            self._write()
        except LeaseNotFound:
            if not self._closed.is_set():
                log.info(
                    "the ticket %s has expired; reading goes on without it",
                    self._key,
                    extra=fields("ticket_expired", key=self._key),
                )
            return False
        except EtcdError as exc:
            log.info(
                "the ticket %s is not renewed: %s",
                self._key,
                exc,
                extra=fields("ticket_not_renewed", key=self._key, error=exc),
            )
        return True

    def _write(self) -> None:
        """A ticket that has gone, with its lease or without, stays away.

        What etcd refuses is not tried again.
        """
        nbytes, total_nbytes = self._reported
        if not self._written or not _is_worth_it(self._written[0], nbytes, total_nbytes):
            return
        reported = [
            replace(pull, nbytes=nbytes, total_nbytes=total_nbytes) for pull in self._written
        ]
        try:
            self._written = [
                pull
                for start in range(0, len(reported), _AT_ONCE)
                for pull in self._put(reported[start : start + _AT_ONCE])
            ]
        except (LeaseNotFound, EtcdUnavailable):
            raise
        except EtcdError as exc:
            log.info(
                "the ticket %s reports no progress: %s",
                self._key,
                exc,
                extra=fields("ticket_unreported", key=self._key, error=exc),
            )
            self._written = []

    def _put(self, pulls: Sequence[Pull]) -> Sequence[Pull]:
        """Those that are there now."""
        while pulls:
            guards = [present(pull.key) for pull in pulls]
            puts = [Put(pull.key, encode(pull), self._lease_id) for pull in pulls]
            keys = [Range(pull.key, keys_only=True) for pull in pulls]
            outcome = self._etcd.decide(guards, puts, otherwise=keys)
            if outcome.done:
                break
            pairs = zip(pulls, outcome.found, strict=True)
            pulls = [pull for pull, found in pairs if found.items]
        return pulls

    def close(self) -> None:
        """Any number of times. Tickets that cannot be given back now expire."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._mark_closed()
        try:
            self._etcd.revoke(self._lease_id)
        except EtcdError as exc:
            log.info(
                "the ticket %s is left to expire: %s",
                self._key,
                exc,
                extra=fields("ticket_left", key=self._key, error=exc),
            )

    def _label(self) -> str:
        return self._key


def _is_worth_it(written: Pull, nbytes: int, total_nbytes: int) -> bool:
    """Another total, the end, or a step from what was written before."""
    if (nbytes, total_nbytes) == (written.nbytes, written.total_nbytes):
        return False
    if total_nbytes != written.total_nbytes or nbytes >= total_nbytes:
        return True
    return abs(nbytes - written.nbytes) * _STEPS >= total_nbytes


def _keep(held: weakref.ref[PullTicket], closed: threading.Event) -> None:
    due = time.monotonic() + TTL_S / 3
    while not closed.wait(max(0.0, min(_REPORT_S, due - time.monotonic()))):
        renew = time.monotonic() >= due
        if renew:
            due = time.monotonic() + TTL_S / 3
        ticket = held()
        if ticket is None or not ticket._beat(renew):
            return
        del ticket  # while it waits, a ticket that is forgotten can be collected
