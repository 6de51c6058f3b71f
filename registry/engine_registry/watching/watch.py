"""From changes under `/engines/` to events about ranks and instances.

`Tracker` is the pure part: what is known, what a change means, and which losses may still turn out
to be a blip. `Watch` runs it over a Follower in a thread of its own and hands the events to the
caller's thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from engine_registry.errors import EtcdError, EtcdUnavailable, RecordDamaged
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.schema.keys import ENGINES, instance_prefix, parse_record_key
from engine_registry.schema.keyvalue import Batch, Change, KeyValue, Snapshot
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import decode_item
from engine_registry.schema.roster import Roster
from engine_registry.schema.status import InstanceState, InstanceStatus
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)

EXPIRED = "lease expired or key deleted"

# A keeper that lost its lease to a stall of etcd puts the same record back at once: not a loss.
BLIP_S = 1.0
_MAX_QUEUED = 1_000  # batches; then the reader waits, and etcd keeps the rest
_JOIN_S = 2.0  # for a callback that is still running; nothing else takes long


@dataclass(frozen=True)
class RankJoined:
    """A rank has registered, or was there when the watch began."""

    record: RankRecord


@dataclass(frozen=True)
class RankUpdated:
    """The record of a rank has changed: its state, its version, or what it holds."""

    record: RankRecord
    previous: RankRecord


@dataclass(frozen=True)
class RankLost:
    """`record` is the last one. `reason` is why: withdrawn, process ended, evicted, its source was
    evicted, lease expired or key deleted, replaced by another process, record damaged.
    """

    record: RankRecord
    reason: str


@dataclass(frozen=True)
class InstanceReady:
    """All ranks of the instance are registered, agree, and can be read."""

    status: InstanceStatus


@dataclass(frozen=True)
class InstanceDegraded:
    """Ranks of the instance are missing, disagree, or cannot be read now: `status` says which."""

    status: InstanceStatus


@dataclass(frozen=True)
class InstanceGone:
    """The last rank of the instance has left."""

    status: InstanceStatus


Event = RankJoined | RankUpdated | RankLost | InstanceReady | InstanceDegraded | InstanceGone
_INSTANCE_EVENTS: dict[InstanceState, type[InstanceReady | InstanceDegraded | InstanceGone]] = {
    InstanceState.READY: InstanceReady,
    InstanceState.DEGRADED: InstanceDegraded,
    InstanceState.GONE: InstanceGone,
}


class Tracker:
    """Feed it snapshots and changes with the time (any monotonic clock); it returns the events that
    follow from them.
    """

    def __init__(self, blip_s: float = BLIP_S) -> None:
        self._blip_s = blip_s
        self._rosters: dict[str, Roster] = {}
        self._told: dict[str, InstanceState] = {}
        # Key of a record that was deleted -> when that counts as a loss; the first due comes first.
        self._doubtful: OrderedDict[str, float] = OrderedDict()

    def snapshot(self, snapshot: Snapshot, now: float) -> list[Event]:
        """The first one, or one after a gap: each difference from what is known is an event."""
        events = self.expire(now)
        present = {item.key for item in snapshot.items}
        for roster in self._rosters.values():
            for record in roster.records.values():
                if record.key not in present:
                    self._doubtful.setdefault(record.key, now + self._blip_s)
            for key in [key for key in roster.damaged if key not in present]:
                del roster.damaged[key]
        for item in snapshot.items:
            events += self._put(item)
        return events + self._tell(set(self._rosters))

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
            elif place[0] in self._rosters:
                roster = self._rosters[place[0]]
                if roster.damaged.pop(change.key, None) is None and place[1] in roster.records:
                    self._doubtful.setdefault(change.key, now + self._blip_s)
        return events + self._tell(touched)

    def expire(self, now: float) -> list[Event]:
        """The losses that are no longer in doubt."""
        events: list[Event] = []
        touched = set()
        while self.due is not None and self.due <= now:
            key, _ = self._doubtful.popitem(last=False)
            instance, rank = parse_record_key(key) or ("", 0)
            events += self._lose(self._rosters[instance], rank, EXPIRED)
            touched.add(instance)
        return events + self._tell(touched)

    @property
    def due(self) -> float | None:
        """When `expire` has something to say."""
        return next(iter(self._doubtful.values()), None)

    def _put(self, item: KeyValue) -> list[Event]:
        place = parse_record_key(item.key)
        if place is None:
            return []
        instance, rank = place
        roster = self._rosters.get(instance)
        if roster is None:
            roster = self._rosters[instance] = Roster(instance)
        known = roster.records.get(rank)
        try:
            record = decode_item(item)
        except RecordDamaged as exc:
            roster.damage(item.key, exc)
            return self._lose(roster, rank, "record damaged") if known else []
        roster.damaged.pop(item.key, None)
        if record.ended:
            return self._lose(roster, rank, record.ended) if known else []
        self._doubtful.pop(item.key, None)
        roster.put(record)
        if known is None:
            return [RankJoined(record)]
        if known.incarnation != record.incarnation:
            return [RankLost(known, "replaced by another process"), RankJoined(record)]
        return [RankUpdated(record, known)] if known != record else []

    def _lose(self, roster: Roster, rank: int, reason: str) -> list[Event]:
        record = roster.remove(rank)
        if record is None:
            return []
        self._doubtful.pop(record.key, None)
        return [RankLost(record, reason)]

    def _tell(self, instances: set[str]) -> list[Event]:
        """How the instances are, where that is not what was told of them last."""
        events: list[Event] = []
        for instance in sorted(instances & self._rosters.keys()):
            roster = self._rosters[instance]
            state = roster.state
            if state is not self._told.get(instance, InstanceState.GONE):
                events.append(_INSTANCE_EVENTS[state](roster.status()))
                self._told[instance] = state
            if state is InstanceState.GONE:  # an instance that is gone leaves no memory behind
                self._told.pop(instance, None)
                del self._rosters[instance]
        return events


class Watch:
    """Iterate over events for ever, or until `stop` (from any thread) or the end of the `with`
    block; or use `call`.
    """

    def __init__(
        self,
        etcd: Etcd,
        instance: str | None = None,
        rank: int | None = None,
        blip_s: float = BLIP_S,
    ) -> None:
        """`etcd` is for this watch alone, which closes it when it stops: so that it need not wait
        for a call to end.
        """
        self._etcd = etcd
        prefix = instance_prefix(instance) if instance else ENGINES
        self._rank = rank
        self._follower = Follower(etcd, prefix if rank is None else f"{prefix}{rank}")
        self._tracker = Tracker(blip_s)
        self._inbox: queue.SimpleQueue[tuple[float, Snapshot | Batch | EtcdError | None]] = (
            queue.SimpleQueue()
        )
        self._room = threading.Semaphore(_MAX_QUEUED)
        self._held_s = 0.0  # for how long the reader has waited for room
        self._full_since: float | None = None
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
        arrived_at = self._now()
        if not self._room.acquire(blocking=False):
            self._full_since = time.monotonic()
            while not self._room.acquire(timeout=0.1):
                if self._stopped.is_set():
                    return
            self._held_s += time.monotonic() - self._full_since
            self._full_since = None
        self._inbox.put((arrived_at, item))

    def _now(self) -> float:
        """A clock for blips.

        It stands still while the reader waits for room: what etcd holds back meanwhile is not late.
        """
        full_since = self._full_since
        return (time.monotonic() if full_since is None else full_since) - self._held_s

    def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None if there is none in time, or when the watch has stopped.

        Raises what etcd refuses for good.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._events and not self._stopped.is_set():
            waits_s = [] if deadline is None else [deadline - time.monotonic()]
            if self._tracker.due is not None:
                waits_s.append(self._tracker.due - self._now())
            try:
                arrived_at, item = self._inbox.get(
                    timeout=max(0.0, min(waits_s)) if waits_s else None
                )
            except queue.Empty:
                self._add(self._tracker.expire(self._now()))
                if not self._events and deadline is not None and time.monotonic() >= deadline:
                    return None
                continue
            self._room.release()
            if self._stopped.is_set():
                break
            if isinstance(item, EtcdError):
                self.stop()
                raise item
            # By when it came, not by when somebody has time for it: a reader that lags must not
            # take a blip for a loss.
            if isinstance(item, Snapshot):
                self._add(self._tracker.snapshot(item, arrived_at))
            elif isinstance(item, Batch):
                self._add(self._tracker.changes(item.changes, arrived_at))
        return self._events.popleft() if self._events and not self._stopped.is_set() else None

    def _add(self, events: Sequence[Event]) -> None:
        """What begins with the key of the one rank are other ranks' keys too, and the instance is
        not seen as a whole then.
        """
        if self._rank is None:
            self._events.extend(events)
            return
        ours = (event for event in events if isinstance(event, RankJoined | RankUpdated | RankLost))
        self._events.extend(event for event in ours if event.record.rank == self._rank)

    def __iter__(self) -> Iterator[Event]:
        while (event := self.next()) is not None:
            yield event

    def call(self, on_event: Callable[[Event], object]) -> Watch:
        """Instead of iterating: calls `on_event` for every event, from a thread of its own, until
        the watch is stopped.

        A callback that raises is logged, and the next event follows. What etcd refuses for good is
        logged and ends the calls.
        """
        self._caller = threading.Thread(
            target=self._deliver, args=(on_event,), name="registry events", daemon=True
        )
        self._caller.start()
        return self

    def _deliver(self, on_event: Callable[[Event], object]) -> None:
        try:
            for event in self:
                try:
                    on_event(event)
                except Exception:
                    log.exception(
                        "the callback for %s failed",
                        type(event).__name__,
                        extra=fields("event_callback_failed"),
                    )
        except EtcdError as exc:
            log.error("no more events: %s", exc, extra=fields("watch_ended", error=exc))

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called, by anybody."""
        return self._stopped.is_set()

    @property
    def away(self) -> EtcdUnavailable | None:
        """Why there is no news: etcd cannot be reached. None while it can."""
        return self._follower.away

    def stop(self) -> None:
        """Ends the iteration, a `next` that waits, and the callbacks.

        May be called from any thread, and again.
        """
        self._stopped.set()
        self._follower.stop()
        self._etcd.close()
        self._inbox.put((0.0, None))

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()
        deadline = time.monotonic() + _JOIN_S
        for thread in (self._thread, self._caller):
            if thread is not None and thread is not threading.current_thread():
                thread.join(timeout=max(0.0, deadline - time.monotonic()))
