"""The content of a prefix or a key, or of several, then every change to it, for ever: what watchers
and waiting resolvers are built on.

Runs in the caller's thread; `stop` may be called from any other.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence

from engine_registry.errors import EtcdRefused, EtcdUnavailable, HistoryLost
from engine_registry.etcd.backoff import Backoff
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.followed import Followed
from engine_registry.etcd.watch import WatchStream
from engine_registry.schema.keyvalue import Batch, Snapshot
from engine_registry.telemetry import metrics
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
# As long after a snapshot no etcd has come back with another store: to start takes it longer.
_FRESH_S = 0.05


class Follower:
    """Iterate: a Snapshot first, then Batches with no gap and no repetition.

    A lost stream is resumed from the revision after the last one seen. Where that history is gone
    (compacted, or etcd came back with another store) a new Snapshot follows instead, and the reader
    has to work out the difference.
    """

    def __init__(
        self,
        etcd: Etcd,
        prefix: str,
        deadline: float | None = None,
        exact: bool = False,
        *,
        others: Sequence[Followed] = (),
        start: Snapshot | None = None,
    ) -> None:
        """`deadline`, on the clock of time.monotonic, ends the iteration. `exact`: only the key of
        that name is followed. `others` are followed on the same stream. `start` is the first
        Snapshot, if the caller has just read all of them at one revision.
        """
        self._etcd = etcd
        self._all = [Followed(prefix, exact), *others]
        self._start = start
        self._deadline = deadline
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._stream: WatchStream | None = None
        self.last_error: EtcdUnavailable | None = None  # why there was no update lately
        self.away_since: float | None = None  # when etcd was lost, if it is

    @property
    def name(self) -> str:
        """What is followed."""
        return ", ".join(each.prefix for each in self._all if not each.optional)

    @property
    def away(self) -> EtcdUnavailable | None:
        """Why the last update may be old: etcd cannot be reached. None while it can."""
        return self.last_error if self.away_since is not None else None

    def stop(self) -> None:
        with self._lock:
            self._stopped.set()
            stream = self._stream
        if stream is not None:
            stream.cancel()

    def __iter__(self) -> Iterator[Snapshot | Batch]:
        backoff = Backoff()
        while not self._over():
            try:
                known_at = -math.inf
                if not self._all[0].revision:
                    known_at = time.monotonic()
                    yield self._read()
                if time.monotonic() - known_at > _FRESH_S:
                    self._check_history()
                self._is_back()
                for batch in self._open():
                    backoff.reset()
                    self._all[batch.watch].remember(batch)
                    if batch.changes:
                        yield batch
            except HistoryLost as exc:
                log.info(
                    "%s: starting again from a snapshot",
                    exc,
                    extra=fields("watch_resync", prefix=self.name),
                )
                metrics.RESYNCS.inc()
                self._all[0].revision = 0
            except EtcdUnavailable as exc:
                self.last_error = exc
                if self._over():
                    return
                self._is_away(exc)
                self._stopped.wait(backoff.next_s())
            finally:
                self._close()

    def _is_away(self, error: EtcdUnavailable) -> None:
        """An outage is one warning, however often it is found to last."""
        if self._stream is not None:
            metrics.STREAM_LOSSES.inc()
        level = logging.DEBUG if self.away_since is not None else logging.WARNING
        log.log(
            level,
            "%s; watching goes on as soon as it is back",
            error,
            extra=fields("watch_lost", prefix=self.name, error=error),
        )
        if self.away_since is None:
            self.away_since = time.monotonic()

    def _is_back(self) -> None:
        if self.away_since is not None:
            away_s = round(time.monotonic() - self.away_since, 3)
            log.info(
                "etcd is back after %.3g s; watching %s goes on",
                away_s,
                self.name,
                extra=fields("watch_resumed", prefix=self.name, away_s=away_s),
            )
            self.away_since = None

    def _over(self) -> bool:
        return self._stopped.is_set() or (
            self._deadline is not None and time.monotonic() >= self._deadline
        )

    def _read(self) -> Snapshot:
        """What there is of all of them now."""
        start, self._start = self._start, None
        if start is not None:
            for each in self._all:
                each.begin(start)
            return start
        snapshots = [one for each in list(self._all) if (one := self._snapshot(each)) is not None]
        for each, snapshot in zip(self._all, snapshots, strict=True):
            each.begin(snapshot)
        items = tuple(item for snapshot in snapshots for item in snapshot.items)
        return Snapshot(snapshots[0].revision, items)

    def _snapshot(self, each: Followed) -> Snapshot | None:
        """None where it is followed no more: it is optional, and we may not read it."""
        try:
            return self._etcd.snapshot(each.prefix, each.exact)
        except EtcdRefused as exc:
            if not each.optional or exc.details.get("reason") != "denied":
                raise
            log.info(
                "%s is not followed: %s", each.prefix, exc, extra=fields("not_followed", error=exc)
            )
            self._all.remove(each)
            return None

    def _check_history(self) -> None:
        """HistoryLost unless this is still the store that we know: a wiped one may have grown past
        our revision since.

        What it says of our last revision must agree with what we saw then: how many keys there
        were, and the newest of them.
        """
        if not all(map(self._is_as_known, self._all)):
            raise HistoryLost("etcd came back with another store")

    def _is_as_known(self, each: Followed) -> bool:
        newest = each.newest
        if each.exact:
            return self._etcd.get(each.prefix, each.revision) == newest
        if self._etcd.count(each.prefix, each.revision) != each.count:
            return False
        return newest is None or self._etcd.get(newest.key, each.revision) == newest

    def _open(self) -> WatchStream:
        remaining = None if self._deadline is None else max(0.01, self._deadline - time.monotonic())
        first, *others = self._all
        stream = self._etcd.watch(
            first.prefix,
            first.revision + 1,
            remaining,
            first.exact,
            others=[(each.prefix, each.revision + 1, each.exact) for each in others],
        )
        with self._lock:
            self._stream = stream
            if self._stopped.is_set():
                stream.cancel()
        return stream

    def _close(self) -> None:
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()
