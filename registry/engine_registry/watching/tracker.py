"""From changes under `/engines/` and `/releases/` to events about ranks and instances: what is
known, what a change means, and which losses may still turn out to be a blip.

Pure; `watching.watch` feeds it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable

from engine_registry.errors import RecordDamaged
from engine_registry.schema.eviction import Eviction
from engine_registry.schema.keys import parse_record_key, parse_release_key
from engine_registry.schema.keyvalue import Change, KeyValue, Snapshot
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import decode_item
from engine_registry.schema.release import Release, decode_release
from engine_registry.schema.roster import Roster
from engine_registry.schema.status import InstanceState
from engine_registry.telemetry.logs import fields
from engine_registry.watching.events import (
    Event,
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    RankJoined,
    RankLost,
    RankUpdated,
    VersionReleased,
)

log = logging.getLogger(__name__)
EXPIRED = "lease expired or key deleted"

# A keeper that lost its lease to a stall of etcd puts the same record back at once: not a loss.
BLIP_S = 1.0

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
        self._reported: dict[str, InstanceState] = {}
        # the last one of each instance, also while its key is gone: until the instance is
        self._releases: dict[str, Release] = {}
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
            for held in [held for held in roster.held.values() if held.key not in present]:
                del roster.held[held.rank]
        for item in snapshot.items:
            events += self._put(item)
        return events + self._report(set(self._rosters)) + self._released(snapshot.items)

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
                roster.held.pop(place[1], None)  # no loss: that was when its process ended
                if roster.damaged.pop(change.key, None) is None and place[1] in roster.records:
                    self._doubtful.setdefault(change.key, now + self._blip_s)
        return events + self._report(touched) + self._released(changes)

    def expire(self, now: float) -> list[Event]:
        """The losses that are no longer in doubt."""
        events: list[Event] = []
        touched = set()
        while self.due is not None and self.due <= now:
            key, _ = self._doubtful.popitem(last=False)
            instance, rank = parse_record_key(key) or ("", 0)
            events += self._lose(self._rosters[instance], rank, EXPIRED)
            touched.add(instance)
        return events + self._report(touched)

    @property
    def due(self) -> float | None:
        """When the next loss is no longer in doubt, on the clock of the caller; None if none is."""
        return next(iter(self._doubtful.values()), None)

    @property
    def held(self) -> tuple[RankRecord, ...]:
        """The last records of all ranks that are held."""
        return tuple(record for roster in self._rosters.values() for record in roster.held.values())

    def _released(self, changes: Iterable[Change]) -> list[Event]:
        """After what is said of the instances. A release that is put back, as its rank was cut off
        from etcd for a while, is no event.
        """
        events: list[Event] = []
        for change in changes:
            instance = parse_release_key(change.key)
            if instance is None:
                continue
            if not isinstance(change, KeyValue):
                if instance not in self._rosters:
                    self._releases.pop(instance, None)
                continue
            try:
                release = decode_release(change)
            except RecordDamaged as exc:
                log.warning("%s", exc, extra=fields("release_damaged", **exc.details))
                continue
            previous = self._releases.get(instance)
            if release != previous:
                self._releases[instance] = release
                events.append(VersionReleased(release, previous))
        return events

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
            roster.held.pop(rank, None)
            return self._lose(roster, rank, "record damaged") if known else []
        roster.damaged.pop(item.key, None)
        if record.ended:
            lost = self._lose(roster, rank, record.ended, record.eviction, record.held_until)
            roster.end(record)
            return lost
        self._doubtful.pop(item.key, None)
        roster.put(record)
        if known is None:
            return [RankJoined(record)]
        if not _of_one_registration(known, record):
            return [RankLost(known, "replaced by another process"), RankJoined(record)]
        return [RankUpdated(record, known)] if known != record else []

    def _lose(
        self,
        roster: Roster,
        rank: int,
        reason: str,
        eviction: Eviction | None = None,
        held_until: str = "",
    ) -> list[Event]:
        record = roster.remove(rank)
        if record is None:
            return []
        self._doubtful.pop(record.key, None)
        return [RankLost(record, reason, eviction, held_until)]

    def _report(self, instances: set[str]) -> list[Event]:
        """The states of the instances that differ from those that were reported last."""
        events: list[Event] = []
        for instance in sorted(instances & self._rosters.keys()):
            roster = self._rosters[instance]
            state = roster.state
            if state is not self._reported.get(instance, InstanceState.GONE):
                events.append(_INSTANCE_EVENTS[state](roster.status()))
                self._reported[instance] = state
            if state is InstanceState.GONE:  # an instance that is gone leaves no memory behind
                self._reported.pop(instance, None)
                self._releases.pop(instance, None)
            if roster.empty:
                del self._rosters[instance]
        return events


def _of_one_registration(one: RankRecord, other: RankRecord) -> bool:
    """A rank that offers other memory takes another incarnation, and has not been lost."""
    return one.incarnation == other.incarnation or _process(one) == _process(other)


def _process(record: RankRecord) -> tuple[str, str, int, str]:
    return record.session_id, record.host, record.pid, record.registered_at
