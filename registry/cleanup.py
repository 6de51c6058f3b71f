"""Evicts what a dead rank leaves useless: the other ranks of an instance that stays degraded for longer than a grace period.

`Grace` is the pure part: which registrations are doomed, and when. `CleaningWatch` is a Watch that also carries it out, if it
leads: of several that run, one evicts. Every eviction is guarded by the record's revision, so it can only hit what was seen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType

from registry.election import Election
from registry.errors import EtcdError
from registry.etcd import Etcd
from registry.keys import instance_prefix
from registry.record import RankRecord
from registry.registration import evict
from registry.resolver import InstanceState
from registry.roster import assess_all
from registry.watcher import Event, InstanceGone, InstanceReady, RankJoined, RankLost, RankUpdated, Watch

log = logging.getLogger(__name__)
_POSTPONED_S = 1.0


@dataclass(frozen=True)
class InstanceCleaned:
    """`evicted` are the registrations that were ended, or with `dry_run` would be. `lost` is the rank whose loss began it."""

    instance: str
    lost: RankRecord
    evicted: tuple[RankRecord, ...]
    dry_run: bool


@dataclass(frozen=True)
class Doomed:
    """Registrations to evict at `due`, because `lost` has been lost and unless it comes back."""

    instance: str
    due: float
    lost: RankRecord
    incarnations: frozenset[str]


class Grace:
    """Feed it the events of a watch. A loss dooms the registrations that stand then, and no later ones: a new launch that
    begins meanwhile is not touched. The return of the lost rank lifts the doom."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._present: dict[str, dict[int, str]] = {}  # instance -> rank -> incarnation
        self._doomed: list[Doomed] = []

    def feed(self, event: Event, now: float) -> None:
        if isinstance(event, RankJoined | RankUpdated):
            record = event.record
            self._present.setdefault(record.instance, {})[record.rank] = record.incarnation
            if isinstance(event, RankJoined):
                self._lift(record.instance, record.rank)
        elif isinstance(event, RankLost):
            record = event.record
            present = self._present.setdefault(record.instance, {})
            present.pop(record.rank, None)
            if present:
                self._doomed.append(Doomed(record.instance, now + self._grace_s, record, frozenset(present.values())))
        elif isinstance(event, InstanceReady | InstanceGone):
            self._lift(event.status.instance)
            if isinstance(event, InstanceGone):
                self._present.pop(event.status.instance, None)

    def _lift(self, instance: str, rank: int | None = None) -> None:
        self._doomed = [
            doomed for doomed in self._doomed if doomed.instance != instance or (rank is not None and doomed.lost.rank != rank)
        ]

    @property
    def due(self) -> float | None:
        """When `expired` has something to say."""
        return min((doomed.due for doomed in self._doomed), default=None)

    def expired(self, now: float) -> list[Doomed]:
        """What is to be evicted now; each is told once."""
        over = [doomed for doomed in self._doomed if doomed.due <= now]
        self._doomed = [doomed for doomed in self._doomed if doomed.due > now]
        return over

    def postpone(self, doomed: Doomed, now: float) -> None:
        """It could not be done, or it is for another process to do, which may die: look again soon."""
        self._doomed.append(replace(doomed, due=now + _POSTPONED_S))


class CleaningWatch:
    """Iterate as over a Watch; in between comes an InstanceCleaned for every instance that this process has cleaned up."""

    def __init__(self, etcd: Etcd, watch: Watch, election: Election, grace_s: float, dry_run: bool = False) -> None:
        self._etcd = etcd
        self._watch = watch
        self._election = election
        self._grace = Grace(grace_s)
        self._dry_run = dry_run

    def __iter__(self) -> Iterator[Event | InstanceCleaned]:
        while not self._watch.stopped:
            due = self._grace.due
            event = self._watch.next(None if due is None else max(0.0, due - time.monotonic()))
            if event is not None:
                self._grace.feed(event, time.monotonic())
                yield event
            for doomed in self._grace.expired(time.monotonic()):
                if self._dry_run or self._election.leading:
                    yield from self._clean(doomed)
                else:
                    self._grace.postpone(doomed, time.monotonic())

    def _clean(self, doomed: Doomed) -> Iterator[InstanceCleaned]:
        try:
            (status,) = assess_all(self._etcd.snapshot(instance_prefix(doomed.instance)).items) or (None,)
            if status is None or status.state is not InstanceState.DEGRADED:
                return
            victims = [record for record in status.records if record.incarnation in doomed.incarnations]
            evicted = [record for record in victims if self._dry_run or evict(self._etcd, record)]
        except EtcdError as exc:
            log.warning("%s is not cleaned up yet: %s", doomed.instance, exc)
            self._grace.postpone(doomed, time.monotonic())
            return
        if evicted:
            yield InstanceCleaned(doomed.instance, doomed.lost, tuple(evicted), self._dry_run)

    def stop(self) -> None:
        self._watch.stop()

    def __enter__(self) -> CleaningWatch:
        if not self._dry_run:  # who only looks on must not keep others from acting
            self._election.start()
        self._watch.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._watch.__exit__(kind, exc, tb)
        self._election.close()
