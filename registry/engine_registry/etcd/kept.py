"""What lies under a prefix, kept up to date: the base of what is asked again and again, and asks
etcd for nothing but changes.

Used by `pulls.follow` and `watching.follow`. Starts one thread for each, which holds no reference
to it while it waits, so that one that is forgotten can be collected.
"""

from __future__ import annotations

import threading
import weakref

from engine_registry.errors import EtcdError, EtcdUnavailable
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.lifetime import Closable
from engine_registry.schema.keyvalue import Batch, Snapshot

_JOIN_S = 2.0


class Kept(Closable):
    """Goes on through outages of etcd."""

    def __init__(self, etcd: Etcd, prefix: str, name: str) -> None:
        """`etcd` is for this alone, which closes it at the end; `name` is the thread's."""
        self._etcd = etcd
        self._follower = Follower(etcd, prefix)
        self._thread = threading.Thread(
            target=_follow, args=(weakref.ref(self), self._follower), name=name, daemon=True
        )

    def _start(self) -> None:
        self._thread.start()
        self._mark_open()

    def _take_in(self, update: Snapshot | Batch) -> None:
        """Called from the thread."""
        raise NotImplementedError

    def _refused(self, error: EtcdError) -> None:
        """Called from the thread, at its end: etcd refuses for good."""
        raise NotImplementedError

    @property
    def away(self) -> EtcdUnavailable | None:
        """Why there is no news: etcd cannot be reached. None while it can."""
        return self._follower.away

    def close(self) -> None:
        """Any number of times."""
        self._mark_closed()
        self._follower.stop()
        self._etcd.close()
        self._thread.join(timeout=_JOIN_S)


def _follow(to: weakref.ref[Kept], follower: Follower) -> None:
    refused = None
    try:
        for update in follower:
            kept = to()
            if kept is None:
                return
            kept._take_in(update)
            del kept
    except EtcdError as exc:
        refused = exc
    if refused is not None and (kept := to()) is not None:
        kept._refused(refused)
