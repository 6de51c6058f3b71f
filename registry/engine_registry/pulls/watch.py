"""Reports the loads that begin and end to read from one registration.

Used by the rank that is read, which counts them.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable

from engine_registry.errors import EtcdError
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.lifetime import Closable
from engine_registry.schema.keys import pulls_prefix
from engine_registry.schema.keyvalue import Batch, Change, KeyValue, Snapshot
from engine_registry.schema.pull_ticket import decode
from engine_registry.schema.record import RankRecord
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_JOIN_S = 2.0

OnPull = Callable[[int], object]  # +1: a load begins to read, -1: a load has ended


class PullWatch(Closable):
    """Reports each load that begins or ends to read from one registration, by its ticket.

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
            target=_follow,
            args=(weakref.ref(self), self._follower, record.key),
            name=f"pulls of {record.key}",
            daemon=True,
        )
        self._thread.start()
        self._mark_open()

    def _take_in(self, update: Snapshot | Batch) -> None:
        if isinstance(update, Snapshot):
            for key in self._held - {item.key for item in update.items}:
                self._end(key)
        for change in update.items if isinstance(update, Snapshot) else update.changes:
            self._see(change)

    def _end_all(self) -> None:
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
        """Any number of times. Reports the end of each load that still reads."""
        self._mark_closed()
        self._follower.stop()
        self._etcd.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=_JOIN_S)

    def _label(self) -> str:
        return f"of {self._record.key}"


def _follow(kept: weakref.ref[PullWatch], follower: Follower, key: str) -> None:
    try:
        for update in follower:
            watch = kept()
            if watch is None:
                return
            watch._take_in(update)
            del watch  # while it waits, a watch that is forgotten can be collected
    except EtcdError as exc:  # no permission, or closed
        log.info(
            "the loads that read from %s are not counted: %s",
            key,
            exc,
            extra=fields("pulls_unseen", error=exc),
        )
    if (watch := kept()) is not None:
        watch._end_all()


def _is_for(ticket: KeyValue, record: RankRecord) -> bool:
    """Whether the ticket is for this registration, and not for one that had the rank before."""
    pull = decode(ticket)
    return pull is not None and pull.incarnation == record.incarnation
