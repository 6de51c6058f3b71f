"""From changes under `/engines/` to events about ranks and instances.

`Tracker` is the pure part: what is known, what a change means, and which losses may still turn out to be a blip. `Watch` runs it
over a Follower in a thread of its own and hands the events to the caller's thread.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from registry.errors import EtcdError, RecordDamaged
from registry.etcd import Etcd
from registry.follow import Follower
from registry.keys import ENGINES, instance_prefix, parse_record_key
from registry.kv import Batch, Change, KeyValue, Snapshot
from registry.record import RankRecord, decode
from registry.resolver import InstanceState, InstanceStatus, assess

log = logging.getLogger(__name__)

EXPIRED = "lease expired or key deleted"

# A keeper that lost its lease to a stall of etcd puts the same record back at once: not a loss.
BLIP_S = 1.0
_MAX_QUEUED = 1_000  # batches; then the reader waits, and etcd keeps the rest


@dataclass(frozen=True)
class RankJoined:
    record: RankRecord


@dataclass(frozen=True)
class RankUpdated:
    record: RankRecord
    previous: RankRecord


@dataclass(frozen=True)
class RankLost:
    """`record` is the last one; `reason` is why: withdrawn, process ended, evicted, lease expired or key deleted, replaced."""

    record: RankRecord
    reason: str


@dataclass(frozen=True)
class InstanceReady:
    status: InstanceStatus


@dataclass(frozen=True)
class InstanceDegraded:
    status: InstanceStatus


@dataclass(frozen=True)
class InstanceGone:
    status: InstanceStatus


Event = RankJoined | RankUpdated | RankLost | InstanceReady | InstanceDegraded | InstanceGone
_INSTANCE_EVENTS: dict[InstanceState, type[InstanceReady | InstanceDegraded | InstanceGone]] = {
    InstanceState.READY: InstanceReady,
    InstanceState.DEGRADED: InstanceDegraded,
    InstanceState.GONE: InstanceGone,
}


class Tracker:
    """Feed it snapshots and changes with the time (any monotonic clock); it returns the events that follow from them."""

    def __init__(self, blip_s: float = BLIP_S) -> None:
        self._blip_s = blip_s
        self._records: dict[str, dict[int, RankRecord]] = {}
        self._damaged: dict[str, dict[str, str]] = {}
        self._doubtful: dict[str, float] = {}  # key of a record that was deleted -> when that counts as a loss
        self._states: dict[str, InstanceState] = {}

    def snapshot(self, snapshot: Snapshot, now: float) -> list[Event]:
        """The first one, or one after a gap: whatever differs from what is known becomes an event."""
        events = self.expire(now)
        present = {item.key for item in snapshot.items}
        for record in [record for ranks in self._records.values() for record in ranks.values()]:
            if record.key not in present:
                self._doubtful.setdefault(record.key, now + self._blip_s)
        for instance in list(self._damaged):
            for key in [key for key in self._damaged[instance] if key not in present]:
                del self._damaged[instance][key]
        for item in snapshot.items:
            events += self._put(item)
        return events + self._assess(set(self._records) | set(self._damaged))

    def changes(self, changes: tuple[Change, ...], now: float) -> list[Event]:
        events = self.expire(now)
        touched = set()
        for change in changes:
            place = parse_record_key(change.key)
            if place is None:
                continue
            touched.add(place[0])
            if isinstance(change, KeyValue):
                events += self._put(change)
            elif self._damaged.get(place[0], {}).pop(change.key, None) is None and place[1] in self._records.get(place[0], {}):
                self._doubtful.setdefault(change.key, now + self._blip_s)
        return events + self._assess(touched)

    def expire(self, now: float) -> list[Event]:
        """The losses that are no longer in doubt."""
        events: list[Event] = []
        touched = set()
        for key in [key for key, due in self._doubtful.items() if due <= now]:
            instance, rank = parse_record_key(key) or ("", 0)
            events += self._lose(instance, rank, EXPIRED)
            touched.add(instance)
        return events + self._assess(touched)

    @property
    def due(self) -> float | None:
        """When `expire` has something to say."""
        return min(self._doubtful.values(), default=None)

    def _put(self, item: KeyValue) -> list[Event]:
        place = parse_record_key(item.key)
        if place is None:
            return []
        instance, rank = place
        known = self._records.get(instance, {}).get(rank)
        try:
            record = decode(item.key, item.value, item.mod_revision)
        except RecordDamaged as exc:
            self._damaged.setdefault(instance, {})[item.key] = str(exc)
            return self._lose(instance, rank, "record damaged") if known else []
        self._damaged.get(instance, {}).pop(item.key, None)
        if record.ended:
            return self._lose(instance, rank, record.ended) if known else []
        self._doubtful.pop(item.key, None)
        if known is not None and known.incarnation != record.incarnation:
            lost = self._lose(instance, rank, "replaced by another process")
            self._records.setdefault(instance, {})[rank] = record
            return [*lost, RankJoined(record)]
        self._records.setdefault(instance, {})[rank] = record
        if known is None:
            return [RankJoined(record)]
        return [RankUpdated(record, known)] if known != record else []

    def _lose(self, instance: str, rank: int, reason: str) -> list[Event]:
        record = self._records[instance].pop(rank)
        self._doubtful.pop(record.key, None)
        return [RankLost(record, reason)]

    def _assess(self, instances: set[str]) -> list[Event]:
        events: list[Event] = []
        for instance in sorted(instances):
            status = assess(instance, self._records.get(instance, {}).values(), tuple(self._damaged.get(instance, {}).values()))
            before = self._states.get(instance, InstanceState.GONE)
            if status.state is not before:
                events.append(_INSTANCE_EVENTS[status.state](status))
            if status.state is InstanceState.GONE:  # an instance that is gone leaves no memory behind
                self._states.pop(instance, None)
                self._records.pop(instance, None)
                self._damaged.pop(instance, None)
            else:
                self._states[instance] = status.state
        return events


class Watch:
    """Iterate over events for ever, or until `stop` (from any thread) or the end of the `with` block; or use `call`."""

    def __init__(self, etcd: Etcd, instance: str | None = None, rank: int | None = None, blip_s: float = BLIP_S) -> None:
        prefix = instance_prefix(instance) if instance else ENGINES
        self._rank = rank
        self._follower = Follower(etcd, prefix if rank is None else f"{prefix}{rank}")
        self._tracker = Tracker(blip_s)
        self._inbox: queue.Queue[Snapshot | Batch | EtcdError | None] = queue.Queue(_MAX_QUEUED)
        self._events: deque[Event] = deque()
        self._stopped = threading.Event()
        self._caller: threading.Thread | None = None
        self._thread = threading.Thread(target=self._read, name="registry watch", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for item in self._follower:
                self._hand_over(item)
            self._hand_over(None)
        except EtcdError as exc:
            self._hand_over(exc)

    def _hand_over(self, item: Snapshot | Batch | EtcdError | None) -> None:
        while not self._stopped.is_set():
            try:
                self._inbox.put(item, timeout=0.5)
                return
            except queue.Full:
                continue

    def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None if there is none in time, or when the watch has stopped. Raises what etcd refuses for good."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._events and not self._stopped.is_set():
            limits = [limit for limit in (deadline, self._tracker.due) if limit is not None]
            try:
                item = self._inbox.get(timeout=max(0.0, min(limits) - time.monotonic()) if limits else None)
            except queue.Empty:
                self._events.extend(self._tracker.expire(time.monotonic()))
                if not self._events and deadline is not None and time.monotonic() >= deadline:
                    return None
                continue
            if isinstance(item, EtcdError):
                self.stop()
                raise item
            if isinstance(item, Snapshot):
                self._events.extend(self._tracker.snapshot(item, time.monotonic()))
            elif isinstance(item, Batch):
                self._events.extend(self._tracker.changes(item.changes, time.monotonic()))
        return self._events.popleft() if self._events and not self._stopped.is_set() else None

    def __iter__(self) -> Iterator[Event]:
        while (event := self.next()) is not None:
            yield event

    def call(self, on_event: Callable[[Event], object]) -> Watch:
        """Instead of iterating: calls `on_event` for every event, from a thread of its own, until the watch is stopped.

        A callback that raises is logged, and the next event follows. What etcd refuses for good is logged and ends the calls.
        """
        self._caller = threading.Thread(target=self._deliver, args=(on_event,), name="registry events", daemon=True)
        self._caller.start()
        return self

    def _deliver(self, on_event: Callable[[Event], object]) -> None:
        try:
            for event in self:
                try:
                    on_event(event)
                except Exception:
                    log.exception("the callback for %s failed", type(event).__name__)
        except EtcdError as exc:
            log.error("no more events: %s", exc)

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def stop(self) -> None:
        self._stopped.set()
        self._follower.stop()
        with contextlib.suppress(queue.Full):  # full: nobody waits for it
            self._inbox.put_nowait(None)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
        for thread in (self._thread, self._caller):
            if thread is not None and thread is not threading.current_thread():
                thread.join(timeout=5.0)
