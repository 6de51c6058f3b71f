"""Which registrations are to be evicted because of the loss of a rank, and when.

Pure; `watching.cleanup` carries it out.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field

from engine_registry.schema.eviction_note import EvictionNote
from engine_registry.schema.record import RankRecord
from engine_registry.watching.events import (
    Event,
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    RankJoined,
    RankLost,
)

_AGAIN_S = 1.0
_UNSEEN = -1  # in the place of a rank: what was lost before we began to watch


@dataclass(frozen=True)
class DueEviction:
    """Registrations to evict because `lost` was lost first and is not back. `unseen`: something was
    lost before we began to watch; a note says which, or there is none, and then the instance has
    never been complete as far as anybody knows.
    """

    instance: str
    lost: RankRecord | None
    incarnations: frozenset[str]
    unseen: bool
    until: float  # losses due by then are meant


@dataclass(slots=True)
class _Loss:
    due: float
    joined_before: int  # ranks that joined before are evicted, in the order of `_Instance.standing`
    record: RankRecord | None
    joined: int


@dataclass(slots=True)
class _Instance:
    # rank -> when it joined, as a number; incarnation
    standing: dict[int, tuple[int, str]] = field(default_factory=dict)
    # by rank; the first due comes first
    losses: OrderedDict[int, _Loss] = field(default_factory=OrderedDict)
    not_before: float = 0.0
    planned: float | None = None  # its entry in the agenda
    noted: bool = False

    @property
    def due(self) -> float | None:
        first = next(iter(self.losses.values()), None)
        return None if first is None else max(first.due, self.not_before)

    @property
    def has_seen_losses(self) -> bool:
        return len(self.losses) > (_UNSEEN in self.losses)


class Grace:
    """Feed it the events of a watch. After a loss the registrations that stand then are to be
    evicted, and no later ones: a new launch that begins meanwhile is not touched. The return of the
    lost rank calls that off.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._numbers = itertools.count()
        self._instances: dict[str, _Instance] = {}
        self._agenda: list[
            tuple[float, str]
        ] = []  # a heap; an entry holds where the instance has planned it, and is not too late
        self._unnoted: OrderedDict[str, None] = OrderedDict()

    def feed(self, event: Event, now: float) -> None:
        if isinstance(event, RankJoined):
            self._join(event.record)
        elif isinstance(event, RankLost):
            self._lose(event.record, now)
        elif isinstance(event, InstanceDegraded):
            known = self._known(event.status.instance)
            if event.status.missing and not known.losses:
                self._add(
                    event.status.instance, known, _UNSEEN, _Loss(now + self._grace_s, 0, None, 0)
                )
        elif isinstance(event, InstanceReady | InstanceGone):
            known = self._known(event.status.instance)
            known.losses.clear()
            self._forget_note(event.status.instance, known)
            if isinstance(event, InstanceGone):
                del self._instances[event.status.instance]

    def _known(self, instance: str) -> _Instance:
        known = self._instances.get(instance)
        if known is None:
            known = self._instances[instance] = _Instance()
        return known

    def _join(self, record: RankRecord) -> None:
        known = self._known(record.instance)
        joined = next(self._numbers)
        loss = known.losses.pop(record.rank, None)
        if (
            loss is not None
            and loss.record is not None
            and loss.record.incarnation == record.incarnation
        ):
            joined = loss.joined  # it was only cut off, and is as old as it was
        known.standing[record.rank] = (joined, record.incarnation)
        self._forget_note(record.instance, known)

    def _lose(self, record: RankRecord, now: float) -> None:
        known = self._known(record.instance)
        joined, _ = known.standing.pop(record.rank, (0, ""))
        if known.standing:
            self._add(
                record.instance,
                known,
                record.rank,
                _Loss(now + self._grace_s, next(self._numbers), record, joined),
            )
            if not known.noted:
                self._unnoted[record.instance] = None

    def _add(self, instance: str, known: _Instance, rank: int, loss: _Loss) -> None:
        known.losses[rank] = loss
        self._plan(instance, known)

    def _plan(self, instance: str, known: _Instance) -> None:
        due = known.due
        if due is not None and (known.planned is None or due < known.planned):
            heapq.heappush(self._agenda, (due, instance))
            known.planned = due

    def _forget_note(self, instance: str, known: _Instance) -> None:
        """The next loss is worth a note again, unless another one is pending."""
        if not known.has_seen_losses:
            known.noted = False
            self._unnoted.pop(instance, None)

    @property
    def due(self) -> float | None:
        """When `expired` has something to say."""
        while self._agenda:
            planned, instance = self._agenda[0]
            known = self._instances.get(instance)
            if known is not None and known.planned == planned == known.due:
                return planned
            heapq.heappop(self._agenda)
            if known is not None and known.planned == planned:
                known.planned = None
                self._plan(instance, known)
        return None

    def expired(self, now: float) -> list[DueEviction]:
        """What is to be evicted now. It comes again soon, in case it cannot be done or another
        process, which may die, has to do it, until it is settled.
        """
        due_now: list[DueEviction] = []
        while (due := self.due) is not None and due <= now:
            instance = self._agenda[0][1]
            known = self._instances[instance]
            over = list(itertools.takewhile(lambda loss: loss.due <= now, known.losses.values()))
            meant = frozenset(
                incarnation
                for joined, incarnation in known.standing.values()
                if joined < over[-1].joined_before
            )
            first = next((loss.record for loss in over if loss.record is not None), None)
            due_now.append(DueEviction(instance, first, meant, over[0].record is None, now))
            known.not_before = now + _AGAIN_S
        return due_now

    def settle(self, eviction: DueEviction) -> None:
        known = self._instances.get(eviction.instance)
        if known is None:
            return
        while known.losses and next(iter(known.losses.values())).due <= eviction.until:
            known.losses.popitem(last=False)
        known.not_before = 0.0
        self._plan(eviction.instance, known)
        self._forget_note(eviction.instance, known)

    @property
    def has_notes(self) -> bool:
        return bool(self._unnoted)

    def next_note(self) -> EvictionNote | None:
        """The note of an instance that has lost a rank, once until the lost rank is back."""
        if not self._unnoted:
            return None
        instance, _ = self._unnoted.popitem(last=False)
        known = self._instances[instance]
        known.noted = True
        first = next(loss.record for loss in known.losses.values() if loss.record is not None)
        return EvictionNote(
            first, frozenset(incarnation for _, incarnation in known.standing.values())
        )
