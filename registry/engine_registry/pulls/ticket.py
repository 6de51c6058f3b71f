"""The ticket that a load holds while it reads from a rank. It lies at
`/pulls/<instance>/<rank>/<load-id>`, under the loader's lease.

A ticket is only issued while the record stands as the loader knows it, so a rank that has begun to
leave sees every ticket that there will ever be. The loader writes its progress into it.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
import weakref
from dataclasses import replace

from engine_registry.errors import EtcdError, EtcdUnavailable, LeaseNotFound
from engine_registry.etcd.client import Etcd
from engine_registry.lifetime import Closable
from engine_registry.registration.writes import made_at
from engine_registry.schema.keys import pulls_prefix
from engine_registry.schema.keyvalue import Put, at_revision, none_created_since, present
from engine_registry.schema.moment import utc
from engine_registry.schema.pull_ticket import Pull, Reader, encode
from engine_registry.schema.record import RankRecord
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_TTL_S = 15.0  # how long a loader that died keeps a rank from leaving
_REPORT_S = 1.0  # the least time between two writes of progress
_STEPS = 200  # the most writes of progress: a load that takes an hour writes no more


class PullTicket(Closable):
    """Held from `take_ticket` to `close`.

    Starts one thread, which renews its lease and writes the progress that is reported.
    """

    def __init__(self, etcd: Etcd, lease_id: int, pull: Pull) -> None:
        self._etcd = etcd
        self._lease_id = lease_id
        self._key = pull.key
        self._written: Pull | None = pull  # None where etcd will take no other
        self._reported = (pull.nbytes, pull.total_nbytes)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=_keep,
            args=(weakref.ref(self), self._closed),
            name=f"ticket {pull.key}",
            daemon=True,
        )
        self._thread.start()
        self._mark_open()

    def report(self, nbytes: int, total_nbytes: int) -> None:
        """How many bytes of how many the load has, for everybody who looks at tickets.

        Never waits: of reports in quick succession, one is written.
        """
        self._reported = (nbytes, total_nbytes)

    def _beat(self, renew: bool) -> bool:
        """Writes the progress, and renews the lease if it is time. False: the ticket is gone."""
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
        written, (nbytes, total_nbytes) = self._written, self._reported
        if written is None or (nbytes, total_nbytes) == (written.nbytes, written.total_nbytes):
            return
        if (
            total_nbytes == written.total_nbytes
            and nbytes < total_nbytes
            and abs(nbytes - written.nbytes) * _STEPS < total_nbytes
        ):
            return
        reported = replace(written, nbytes=nbytes, total_nbytes=total_nbytes)
        try:
            there = self._etcd.commit(
                [present(self._key)], [Put(self._key, encode(reported), self._lease_id)]
            )
        except (LeaseNotFound, EtcdUnavailable):
            raise
        except EtcdError as exc:
            log.info(
                "the ticket %s reports no progress: %s",
                self._key,
                exc,
                extra=fields("ticket_unreported", key=self._key, error=exc),
            )
            self._written = None
        else:
            self._written = reported if there else None

    def close(self) -> None:
        """Any number of times. A ticket that cannot be given back now expires."""
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


def _keep(held: weakref.ref[PullTicket], closed: threading.Event) -> None:
    due = time.monotonic() + _TTL_S / 3
    while not closed.wait(max(0.0, min(_REPORT_S, due - time.monotonic()))):
        renew = time.monotonic() >= due
        if renew:
            due = time.monotonic() + _TTL_S / 3
        ticket = held()
        if ticket is None or not ticket._beat(renew):
            return
        del ticket  # while it waits, a ticket that is forgotten can be collected


def take_ticket(
    etcd: Etcd,
    record: RankRecord,
    reader: RankRecord | None = None,
    free_since: int | None = None,
) -> PullTicket | None:
    """A ticket to read from the rank, or None where its record is not any more what it was when
    `record` was read; with `free_since`, a revision, also where another load has taken a ticket to
    read from the rank since.
    """
    pull = Pull(
        record.instance,
        record.rank,
        record.incarnation,
        # nobody else has it: a guard on the key would only make a lost answer look like a refusal
        uuid.uuid4().hex,
        # a name may hold bytes that are no text, which JSON has no form for
        host=socket.gethostname().encode(errors="replace").decode(),
        pid=os.getpid(),
        reader=Reader.of(reader) if reader is not None else None,
        began_at=utc(),
    )
    others = pulls_prefix(record.instance, record.rank)
    free = [] if free_since is None else [none_created_since(others, free_since)]
    lease_id = etcd.grant(_TTL_S)
    # A wiped store may hold another's record at that revision: then the header shows the reader.
    same = at_revision(record.key, record.mod_revision)
    put = Put(pull.key, encode(pull), lease_id)
    if etcd.commit([same, *free], [put]) or (free and made_at(etcd, put)):
        return PullTicket(etcd, lease_id, pull)
    etcd.revoke(lease_id)
    return None
