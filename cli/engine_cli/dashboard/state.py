"""What the page shows, of the events of a watch and of pull tickets: instances, ranks, flows, and
events with their reasons. Pure; `feed` shows it everything, with the time.

Values are JSON. A version is a text in it, as JavaScript has no integers of 64 bits.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from engine_cli.dashboard.absent import MISSING, held_row, lost_row
from engine_cli.dashboard.journal import Changes, Journal
from engine_cli.dashboard.picture import bounded, picture
from engine_cli.render.board import Speeds
from engine_cli.render.documents import EVENTS
from engine_cli.render.flows import Flows, reader_of
from engine_cli.render.states import UNRESPONSIVE, rank_state_of, state_of
from engine_cli.render.texts import answering, event_text, reads_from, why_not_ready
from engine_registry import (
    Event,
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    InstanceStatus,
    Pull,
    RankJoined,
    RankLost,
    RankRecord,
    RankState,
    Release,
    VersionReleased,
)
from engine_registry.schema.labels import labels_text
from engine_registry.schema.moment import moment, utc
from engine_registry.schema.roster import Roster
from engine_registry.schema.status import InstanceState
from engine_registry.watching.events import RankEvent

MAX_EVENTS = 300
MAX_ABSENT = 256  # ranks of one instance that are shown though they are missing
_SHORT = 8  # digits of a content: enough to see that two are equal
_BUSY = (RankState.LOADING, RankState.UPDATING, RankState.DRAINING)


class State:
    """Not thread-safe."""

    def __init__(self, began_at: datetime) -> None:
        """Ranks that had registered before `began_at` are no news."""
        self._began_at = began_at
        self._rosters: dict[str, Roster] = {}
        self._told: dict[str, InstanceStatus] = {}  # as the watch last reported it
        self._lost: dict[tuple[str, int], dict[str, Any]] = {}
        self._held: dict[str, dict[int, RankRecord]] = {}
        self._shown: dict[str, set[int]] = {}  # the ranks that the journal has
        self._touched: dict[str, set[int]] = {}  # since the last look
        self._speeds = Speeds()
        self._flows = Flows((), ())
        self._journal = Journal()
        self._events: deque[tuple[str, str]] = deque()
        self._count = 0
        self._journal.put(("began", ""), utc(began_at))

    def see(self, event: Event, at: datetime) -> None:
        news = self._is_news(event)
        if isinstance(event, InstanceReady | InstanceDegraded | InstanceGone):
            self._told[event.status.instance] = event.status
            self._touched.setdefault(event.status.instance, set())
        elif not isinstance(event, VersionReleased):
            record = event.record
            roster = self._rosters.setdefault(record.instance, Roster(record.instance))
            self._touched.setdefault(record.instance, set()).add(record.rank)
            if isinstance(event, RankLost):
                roster.remove(record.rank)
                self._lost[record.instance, record.rank] = lost_row(event, at)
            else:
                roster.put(record)
                self._lost.pop((record.instance, record.rank), None)
        if news:
            self._note(event, at)

    def record(self, instance: str, rank: int) -> RankRecord | None:
        roster = self._rosters.get(instance)
        return roster.records.get(rank) if roster else None

    def away(self, since: str | None, reason: str = "") -> None:
        """Whether etcd can be reached: None, or since when not, and why."""
        self._journal.put(("etcd", ""), {"away_since": since, "reason": reason})

    def look(
        self,
        pulls: Iterable[Pull],
        now: float,
        unseen: str | None = None,
        held: Iterable[RankRecord] = (),
    ) -> None:
        """The tickets as they are at the time `now`, of any clock. From here on `since` tells all.

        `unseen` is why tickets are not known. `held` are the ranks that are held then.
        """
        self._hold(held)
        before = self._flows
        self._flows = Flows(
            (record for roster in self._rosters.values() for record in roster.records.values()),
            pulls,
        )
        self._speeds.see(self._flows, now)
        for flows in (before, self._flows):
            for record in flows.participants():
                self._touched.setdefault(record.instance, set()).add(record.rank)
        for instance, ranks in self._touched.items():
            self._show(instance, ranks, now)
        self._touched = {}
        drawn = picture(self._flows, lambda reader: self._speeds.of(reader, now))
        self._journal.put(("picture", ""), {**drawn, "unseen": unseen})

    def _hold(self, records: Iterable[RankRecord]) -> None:
        """These and no others."""
        before, self._held = self._held, {}
        for record in records:
            self._held.setdefault(record.instance, {})[record.rank] = record
        for instance in before.keys() | self._held.keys():
            one, other = before.get(instance, {}), self._held.get(instance, {})
            for rank in one.keys() | other.keys():
                if one.get(rank) is not other.get(rank):
                    self._touched.setdefault(instance, set()).add(rank)

    def since(self, revision: int | None) -> Changes:
        return self._journal.since(revision)

    def _is_news(self, event: Event) -> bool:
        """Not what was there before the watch began. An instance that was degraded then is."""
        if isinstance(event, RankJoined):
            return _time(event.record.registered_at, self._began_at) >= self._began_at
        if isinstance(event, VersionReleased):
            return _time(event.release.released_at, self._began_at) >= self._began_at
        if isinstance(event, InstanceReady):
            return event.status.instance in self._told or any(
                _time(record.registered_at, self._began_at) >= self._began_at
                for record in event.status.records
            )
        return True

    def _note(self, event: Event, at: datetime) -> None:
        self._count += 1
        about: RankRecord | InstanceStatus | Release = (
            event.record
            if isinstance(event, RankEvent)
            else event.release
            if isinstance(event, VersionReleased)
            else event.status
        )
        key = ("event", f"{self._count:012d}")
        self._journal.put(
            key,
            {
                "at": utc(at),
                "kind": "instance_loading" if _begins_to_load(event) else EVENTS[type(event)],
                "instance": about.instance,
                "rank": about.rank if isinstance(about, RankRecord) else None,
                "text": event_text(event),
            },
        )
        self._events.append(key)
        if len(self._events) > MAX_EVENTS:
            self._journal.delete(self._events.popleft())

    def _show(self, instance: str, ranks: set[int], now: float) -> None:
        roster = self._rosters.get(instance) or Roster(instance)
        held = self._held.get(instance, {})
        roster.held = {rank: each for rank, each in held.items() if rank not in roster.records}
        told = self._told.get(instance)
        if told is not None and told.state is InstanceState.GONE:
            del self._told[instance]
            told = None
        if roster.empty and told is None:
            self._forget(instance)
            return
        status = roster.status()
        absent = set(status.missing[:MAX_ABSENT])
        shown = self._shown.setdefault(instance, set())
        for rank in (shown | absent | ranks) - roster.records.keys():
            key = ("rank", f"{instance}/{rank}")
            if rank in absent:
                gone = self._lost.get((instance, rank), MISSING)
                if rank in roster.held:
                    gone = {**gone, **held_row(roster.held[rank])}
                self._journal.put(key, {"instance": instance, "rank": rank, **gone})
            else:
                self._journal.delete(key)
                self._lost.pop((instance, rank), None)
                shown.discard(rank)
        for rank in ranks & roster.records.keys():
            record = roster.records[rank]
            self._journal.put(("rank", f"{instance}/{rank}"), self._rank(record, now))
        shown |= absent | (ranks & roster.records.keys())
        self._journal.put(("instance", instance), self._instance(status, told, now))

    def _forget(self, instance: str) -> None:
        self._rosters.pop(instance, None)
        for rank in self._shown.pop(instance, set()):
            self._journal.delete(("rank", f"{instance}/{rank}"))
            self._lost.pop((instance, rank), None)
        self._journal.delete(("instance", instance))

    def _rank(self, record: RankRecord, now: float) -> dict[str, Any]:
        reads, readers = self._flows.reads(record), self._flows.readers(record)
        progress = self._flows.progress(record)
        return {
            "instance": record.instance,
            "rank": record.rank,
            "state": rank_state_of(record),
            "reason": answering(record) if record.unresponsive_since else "",
            "version": str(record.version),
            "content": record.content[:_SHORT],
            "host": record.host,
            "device": record.device,
            "session": record.session_id,
            "protocol": record.protocol,
            "tensors": record.manifest.tensors,
            "nbytes": record.manifest.nbytes,
            "since": record.registered_at,
            "fraction": progress.fraction if progress else None,
            "speed": bounded(self._speeds.of(record.incarnation, now)),
            "reads_from": reads_from(reads) if reads else "",
            "read_by": len({reader_of(pull) for pull in readers}),
        }

    def _instance(
        self, status: InstanceStatus, told: InstanceStatus | None, now: float
    ) -> dict[str, Any]:
        """A record that is damaged is known by what the watch has told, and only there."""
        unread = told is not None and told.state is InstanceState.DEGRADED and not status.summary
        readers = {reader_of(pull) for each in status.records for pull in self._flows.readers(each)}
        return {
            "instance": status.instance,
            "model": str(status.model) if status.model else "",
            "state": "degraded" if unread else _state(status),
            "present": len(status.records),
            "world_size": status.world_size,
            "version": None if status.version is None else str(status.version),
            "content": _content(status),
            "labels": labels_text(status.labels),
            "nbytes": bounded(status.nbytes),
            "why": told.summary if unread and told else why_not_ready(status, stays=True),
            "fraction": self._flows.loaded(status),
            "speed": bounded(
                sum(
                    self._speeds.of(record.incarnation, now)
                    for record in status.records
                    if record.state is RankState.LOADING
                )
            ),
            "read_by": len(readers),
        }


def _begins_to_load(event: Event) -> bool:
    """Which is no loss, though the instance is not complete."""
    return isinstance(event, InstanceDegraded) and RankState.LOADING in event.status.states


def _state(status: InstanceStatus) -> str:
    """For people: what is going on comes first, then what is missing or wrong."""
    if status.state is InstanceState.GONE:
        return state_of(status)
    if status.state is InstanceState.READY:
        return UNRESPONSIVE if status.unresponsive else "ready"
    if status.missing:
        return "incomplete"
    return next((state.value for state in _BUSY if state in status.states), "degraded")


def _content(status: InstanceStatus) -> str:
    """Equal for two instances whose ranks hold the same."""
    if len(status.contents) <= 1:
        return "".join(status.contents)[:_SHORT]
    return hashlib.blake2b(" ".join(status.contents).encode()).hexdigest()[:_SHORT]


def _time(text: str, default: datetime) -> datetime:
    """Of a record, which anybody may have written."""
    try:
        at = moment(text)
    except ValueError:
        return default
    return at if at.tzinfo else default
