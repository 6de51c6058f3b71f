"""Pull tickets: who is reading from a rank. `/pulls/<instance>/<rank>/<load-id>`, under the loader's lease.

A loader holds one while it reads; a rank that wants to leave waits until there are none. A ticket is only issued while the
record stands as the loader knows it, so a rank that has begun to leave sees every ticket there will ever be.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType

from registry.errors import EtcdError, LeaseNotFound
from registry.etcd import Etcd
from registry.follow import Follower
from registry.keys import pull_key, pulls_prefix
from registry.kv import Change, KeyValue, Put, Snapshot, unchanged
from registry.logs import fields
from registry.record import RankRecord

log = logging.getLogger(__name__)
_JOIN_S = 2.0
_TTL_S = 15.0  # how long a loader that died keeps a rank from leaving


class PullTicket:
    """Held from `take_ticket` to `close`. Starts one thread, which renews its lease."""

    def __init__(self, etcd: Etcd, lease_id: int, key: str) -> None:
        self._etcd = etcd
        self._lease_id = lease_id
        self._key = key
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"ticket {key}", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._closed.wait(_TTL_S / 3):
            try:
                self._etcd.keep_alive(self._lease_id)
            except LeaseNotFound:
                log.info(
                    "the ticket %s has expired; reading goes on without it",
                    self._key,
                    extra=fields("ticket_expired", key=self._key),
                )
                return
            except EtcdError as exc:
                log.info(
                    "the ticket %s is not renewed: %s", self._key, exc, extra=fields("ticket_not_renewed", key=self._key, error=exc)
                )

    def close(self) -> None:
        """Any number of times. A ticket that cannot be given back now expires."""
        if self._closed.is_set():
            return
        self._closed.set()
        try:
            self._etcd.revoke(self._lease_id)
        except EtcdError as exc:
            log.info("the ticket %s is left to expire: %s", self._key, exc, extra=fields("ticket_left", key=self._key, error=exc))

    def __enter__(self) -> PullTicket:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


OnPull = Callable[[int], object]  # +1: somebody begins to read, -1: somebody has ended


class PullWatch:
    """Tells who reads from one registration, as far as tickets say. Starts one thread, which goes on through outages of etcd."""

    def __init__(self, etcd: Etcd, record: RankRecord, on_pull: OnPull) -> None:
        """`etcd` is for this alone, which closes it at the end."""
        self._etcd = etcd
        self._record = record
        self._on_pull = on_pull
        self._held: set[str] = set()  # keys of tickets that are out now
        self._follower = Follower(etcd, pulls_prefix(record.instance, record.rank))
        self._thread = threading.Thread(target=self._watch, name=f"pulls of {record.key}", daemon=True)
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
            log.info("nobody is counted who reads from %s: %s", self._record.key, exc, extra=fields("pulls_unseen", error=exc))
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

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _is_for(ticket: KeyValue, record: RankRecord) -> bool:
    """Rather than for a registration that had the rank before."""
    try:
        told = json.loads(ticket.value)
    except (ValueError, RecursionError):
        return False
    return isinstance(told, dict) and told.get("incarnation") == record.incarnation


def take_ticket(etcd: Etcd, record: RankRecord) -> PullTicket | None:
    """A ticket to read from the rank, or None where its record is not any more what it was when `record` was read."""
    load_id = uuid.uuid4().hex  # nobody else has it: a guard on the key would only make a lost answer look like a refusal
    key = pull_key(record.instance, record.rank, load_id)
    value = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "incarnation": record.incarnation}).encode()
    lease_id = etcd.grant(_TTL_S)
    if etcd.commit([unchanged(record.key, record.mod_revision)], [Put(key, value, lease_id)]):
        return PullTicket(etcd, lease_id, key)
    etcd.revoke(lease_id)
    return None


def count_pulls(etcd: Etcd, instance: str, rank: int) -> int:
    return etcd.count(pulls_prefix(instance, rank))


def wait_for_no_pulls(etcd: Etcd, instance: str, rank: int, timeout_s: float) -> int:
    """Blocks until nobody reads from the rank, or the time is over: how many still do."""
    deadline = time.monotonic() + timeout_s
    for _ in Follower(etcd, pulls_prefix(instance, rank), deadline):
        if not count_pulls(etcd, instance, rank):
            return 0
    return count_pulls(etcd, instance, rank)
