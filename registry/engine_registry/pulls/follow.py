"""The tickets of all loads, kept up to date for a table that is drawn again and again."""

from __future__ import annotations

import logging
import threading
import weakref

from engine_registry.errors import EtcdError
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.lifetime import Closable
from engine_registry.schema.keys import PULLS
from engine_registry.schema.keyvalue import Batch, Change, KeyValue, Snapshot
from engine_registry.schema.pull_ticket import Pull, decode
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_JOIN_S = 2.0


class AllPulls(Closable):
    """The tickets of all loads, kept up to date.

    Starts one thread, which goes on through outages of etcd.
    """

    def __init__(self, etcd: Etcd) -> None:
        """`etcd` is for this alone, which closes it at the end."""
        self._etcd = etcd
        self._lock = threading.Lock()
        self._pulls: dict[str, Pull] = {}  # by key
        self._follower = Follower(etcd, PULLS)
        self.unseen: str | None = None  # why nothing more will be known: no permission, for example
        self._thread = threading.Thread(
            target=_follow, args=(weakref.ref(self), self._follower), name="all pulls", daemon=True
        )
        self._thread.start()
        self._mark_open()

    def now(self) -> tuple[Pull, ...]:
        """The tickets that are known now. Never waits for etcd."""
        with self._lock:
            return tuple(self._pulls.values())

    def _take_in(self, update: Snapshot | Batch) -> None:
        with self._lock:
            if isinstance(update, Snapshot):
                self._pulls.clear()
            for change in update.items if isinstance(update, Snapshot) else update.changes:
                self._see(change)

    def _see(self, change: Change) -> None:
        pull = decode(change) if isinstance(change, KeyValue) else None
        if pull is not None:
            self._pulls[pull.key] = pull
        else:
            self._pulls.pop(change.key, None)

    def close(self) -> None:
        """Any number of times."""
        self._mark_closed()
        self._follower.stop()
        self._etcd.close()
        self._thread.join(timeout=_JOIN_S)


def _follow(kept: weakref.ref[AllPulls], follower: Follower) -> None:
    reason = None
    try:
        for update in follower:
            pulls = kept()
            if pulls is None:
                return
            pulls._take_in(update)
            del pulls  # while it waits, pulls that are forgotten can be collected
    except EtcdError as exc:
        log.info("loads that read are not seen: %s", exc, extra=fields("pulls_unseen", error=exc))
        reason = str(exc)
    if reason is not None and (pulls := kept()) is not None:
        pulls.unseen = reason
