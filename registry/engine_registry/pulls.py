"""Pull tickets: who is reading from a rank. `/pulls/<instance>/<rank>/<load-id>`, under the
loader's lease.

A loader holds one while it reads, and writes into it how far it is; a rank that wants to leave
waits until there are none. A ticket is only issued while the record stands as the loader knows it,
so a rank that has begun to leave sees every ticket there will ever be.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timezone
from types import TracebackType

from engine_registry.errors import EtcdError, EtcdUnavailable, LeaseNotFound
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.schema.keys import PULLS, check_instance, pulls_prefix
from engine_registry.schema.keyvalue import Change, KeyValue, Put, Snapshot, at_revision, present
from engine_registry.schema.pull_ticket import Pull, Reader, decode, encode
from engine_registry.schema.record import RankRecord
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_JOIN_S = 2.0
_TTL_S = 15.0  # how long a loader that died keeps a rank from leaving
_TELL_S = 1.0  # how often at most a ticket says how far its load is
_STEPS = 200  # and in how many steps: a load that takes an hour is told no more often


class PullTicket:
    """Held from `take_ticket` to `close`.

    Starts one thread, which renews its lease and writes what it is told.
    """

    def __init__(self, etcd: Etcd, lease_id: int, pull: Pull) -> None:
        self._etcd = etcd
        self._lease_id = lease_id
        self._key = pull.key
        self._written: Pull | None = pull  # None where etcd will take no other
        self._told = (pull.nbytes, pull.total_nbytes)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"ticket {pull.key}", daemon=True)
        self._thread.start()

    def tell(self, nbytes: int, total_nbytes: int) -> None:
        """How far the load is, for those who look on.

        Never waits: what is told in quick succession is written once.
        """
        self._told = (nbytes, total_nbytes)

    def _keep(self) -> None:
        due = time.monotonic() + _TTL_S / 3
        while not self._closed.wait(max(0.0, min(_TELL_S, due - time.monotonic()))):
            try:
                if time.monotonic() >= due:
                    due = time.monotonic() + _TTL_S / 3
                    self._etcd.keep_alive(self._lease_id)
                self._write()
            except LeaseNotFound:
                if not self._closed.is_set():
                    log.info(
                        "the ticket %s has expired; reading goes on without it",
                        self._key,
                        extra=fields("ticket_expired", key=self._key),
                    )
                return
            except EtcdError as exc:
                log.info(
                    "the ticket %s is not renewed: %s",
                    self._key,
                    exc,
                    extra=fields("ticket_not_renewed", key=self._key, error=exc),
                )

    def _write(self) -> None:
        """A ticket that has gone, with its lease or without, stays away.

        What etcd refuses is not tried again.
        """
        written, (nbytes, total_nbytes) = self._written, self._told
        if written is None or (nbytes, total_nbytes) == (written.nbytes, written.total_nbytes):
            return
        if (
            total_nbytes == written.total_nbytes
            and nbytes < total_nbytes
            and abs(nbytes - written.nbytes) * _STEPS < total_nbytes
        ):
            return
        told = replace(written, nbytes=nbytes, total_nbytes=total_nbytes)
        try:
            there = self._etcd.commit(
                [present(self._key)], [Put(self._key, encode(told), self._lease_id)]
            )
        except (LeaseNotFound, EtcdUnavailable):
            raise
        except EtcdError as exc:
            log.info(
                "the ticket %s tells no progress: %s",
                self._key,
                exc,
                extra=fields("ticket_untold", key=self._key, error=exc),
            )
            self._written = None
        else:
            self._written = told if there else None

    def close(self) -> None:
        """Any number of times. A ticket that cannot be given back now expires."""
        if self._closed.is_set():
            return
        self._closed.set()
        try:
            self._etcd.revoke(self._lease_id)
        except EtcdError as exc:
            log.info(
                "the ticket %s is left to expire: %s",
                self._key,
                exc,
                extra=fields("ticket_left", key=self._key, error=exc),
            )

    def __enter__(self) -> PullTicket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


OnPull = Callable[[int], object]  # +1: somebody begins to read, -1: somebody has ended


class PullWatch:
    """Tells who reads from one registration, as far as tickets say.

    Starts one thread, which goes on through outages of etcd.
    """

    def __init__(self, etcd: Etcd, record: RankRecord, on_pull: OnPull) -> None:
        """`etcd` is for this alone, which closes it at the end."""
        self._etcd = etcd
        self._record = record
        self._on_pull = on_pull
        self._held: set[str] = set()  # keys of tickets that are out now
        self._follower = Follower(etcd, pulls_prefix(record.instance, record.rank))
        self._thread = threading.Thread(
            target=self._watch, name=f"pulls of {record.key}", daemon=True
        )
        self._thread.start()

    def _watch(self) -> None:
        try:
            for update in self._follower:
                if isinstance(update, Snapshot):
                    for key in self._held - {item.key for item in update.items}:
                        self._end(key)
                for change in update.items if isinstance(update, Snapshot) else update.changes:
                    self._see(change)
        except EtcdError as exc:  # no permission, or closed
            log.info(
                "nobody is counted who reads from %s: %s",
                self._record.key,
                exc,
                extra=fields("pulls_unseen", error=exc),
            )
        for key in set(self._held):
            self._end(key)

    def _see(self, change: Change) -> None:
        if not isinstance(change, KeyValue):
            self._end(change.key)
        elif change.key not in self._held and _is_for(change, self._record):
            self._held.add(change.key)
            self._on_pull(+1)

    def _end(self, key: str) -> None:
        if key in self._held:
            self._held.remove(key)
            self._on_pull(-1)

    def close(self) -> None:
        """Any number of times. Who still reads is told to have ended."""
        self._follower.stop()
        self._etcd.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=_JOIN_S)

    def __enter__(self) -> PullWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _is_for(ticket: KeyValue, record: RankRecord) -> bool:
    """Rather than for a registration that had the rank before."""
    pull = decode(ticket)
    return pull is not None and pull.incarnation == record.incarnation


class AllPulls:
    """Who reads from whom, kept up to date.

    Starts one thread, which goes on through outages of etcd.
    """

    def __init__(self, etcd: Etcd) -> None:
        """`etcd` is for this alone, which closes it at the end."""
        self._etcd = etcd
        self._lock = threading.Lock()
        self._pulls: dict[str, Pull] = {}  # by key
        self._follower = Follower(etcd, PULLS)
        self.unseen: str | None = None  # why nothing more will be known: no permission, for example
        self._thread = threading.Thread(target=self._follow, name="all pulls", daemon=True)
        self._thread.start()

    def now(self) -> tuple[Pull, ...]:
        """As far as is known. Never waits for etcd."""
        with self._lock:
            return tuple(self._pulls.values())

    def _follow(self) -> None:
        try:
            for update in self._follower:
                with self._lock:
                    if isinstance(update, Snapshot):
                        self._pulls.clear()
                    for change in update.items if isinstance(update, Snapshot) else update.changes:
                        self._see(change)
        except EtcdError as exc:
            log.info(
                "not known who reads from whom: %s", exc, extra=fields("pulls_unseen", error=exc)
            )
            self.unseen = str(exc)

    def _see(self, change: Change) -> None:
        pull = decode(change) if isinstance(change, KeyValue) else None
        if pull is not None:
            self._pulls[pull.key] = pull
        else:
            self._pulls.pop(change.key, None)

    def close(self) -> None:
        """Any number of times."""
        self._follower.stop()
        self._etcd.close()
        self._thread.join(timeout=_JOIN_S)

    def __enter__(self) -> AllPulls:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def take_ticket(
    etcd: Etcd, record: RankRecord, reader: RankRecord | None = None
) -> PullTicket | None:
    """A ticket to read from the rank, or None where its record is not any more what it was when
    `record` was read.
    """
    pull = Pull(
        record.instance,
        record.rank,
        record.incarnation,
        # nobody else has it: a guard on the key would only make a lost answer look like a refusal
        uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        reader=Reader.of(reader) if reader is not None else None,
        began_at=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
    )
    lease_id = etcd.grant(_TTL_S)
    # A wiped store may hold another's record at that revision: then the header tells the reader.
    if etcd.commit(
        [at_revision(record.key, record.mod_revision)], [Put(pull.key, encode(pull), lease_id)]
    ):
        return PullTicket(etcd, lease_id, pull)
    etcd.revoke(lease_id)
    return None


def readers_of(etcd: Etcd, record: RankRecord) -> tuple[Pull, ...]:
    """Who reads from this registration."""
    some = _decoded(etcd.snapshot(pulls_prefix(record.instance, record.rank)).items)
    return tuple(pull for pull in some if pull.incarnation == record.incarnation)


def all_pulls(etcd: Etcd, instance: str | None = None) -> tuple[Pull, ...]:
    """Who reads from whom, or from the instance."""
    return _decoded(
        etcd.snapshot(PULLS if instance is None else f"{PULLS}{check_instance(instance)}/").items
    )


def _decoded(items: Iterable[KeyValue]) -> tuple[Pull, ...]:
    return tuple(pull for item in items if (pull := decode(item)) is not None)


def count_pulls(etcd: Etcd, instance: str, rank: int) -> int:
    return etcd.count(pulls_prefix(instance, rank))


def wait_for_no_pulls(etcd: Etcd, instance: str, rank: int, timeout_s: float) -> int:
    """Blocks until nobody reads from the rank, or the time is over: how many still do."""
    deadline = time.monotonic() + timeout_s
    for _ in Follower(etcd, pulls_prefix(instance, rank), deadline):
        if not count_pulls(etcd, instance, rank):
            return 0
    return count_pulls(etcd, instance, rank)
