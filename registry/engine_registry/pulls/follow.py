"""The tickets of all loads, kept up to date for a table that is drawn again and again."""

from __future__ import annotations

import logging
import threading
from types import TracebackType

from engine_registry.errors import EtcdError
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.schema.keys import PULLS
from engine_registry.schema.keyvalue import Change, KeyValue, Snapshot
from engine_registry.schema.pull_ticket import Pull, decode
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_JOIN_S = 2.0


class AllPulls:
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
        self._thread = threading.Thread(target=self._follow, name="all pulls", daemon=True)
        self._thread.start()

    def now(self) -> tuple[Pull, ...]:
        """The tickets that are known now. Never waits for etcd."""
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
                "the loads that read are not known: %s",
                exc,
                extra=fields("pulls_unseen", error=exc),
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
