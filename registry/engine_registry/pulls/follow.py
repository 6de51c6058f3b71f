"""The tickets of all loads, kept up to date for a table that is drawn again and again."""

from __future__ import annotations

import logging
import threading

from engine_registry.errors import EtcdError
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.kept import Kept
from engine_registry.schema.keys import PULLS
from engine_registry.schema.keyvalue import Batch, Change, KeyValue, Snapshot
from engine_registry.schema.pull_ticket import Pull, decode
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


class AllPulls(Kept):
    """The tickets of all loads, kept up to date.

    Starts one thread, which goes on through outages of etcd.
    """

    def __init__(self, etcd: Etcd) -> None:
        """`etcd` is for this alone, which closes it at the end."""
        super().__init__(etcd, PULLS, "all pulls")
        self._lock = threading.Lock()
        self._pulls: dict[str, Pull] = {}  # by key
        self.unseen: str | None = None  # why nothing more will be known: no permission, for example
        self._start()

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

    def _refused(self, error: EtcdError) -> None:
        log.info(
            "loads that read are not seen: %s", error, extra=fields("pulls_unseen", error=error)
        )
        self.unseen = str(error)
