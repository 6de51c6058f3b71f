"""What is known of one instance: its records as they come and go, by kind and in pages, so that a
change of one rank costs the same however many there are. Pure; the tracker, a waiting resolve and
the lists are made of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from engine_registry.collector import collector_paused
from engine_registry.errors import RecordDamaged
from engine_registry.schema.keys import ENGINES, parse_record_key
from engine_registry.schema.keyvalue import Change, Deletion, KeyValue
from engine_registry.schema.printable import short
from engine_registry.schema.record import RankRecord, RankState
from engine_registry.schema.record_format import decode_item
from engine_registry.schema.status import (
    InstanceState,
    InstanceStatus,
    Page,
    Pages,
    named,
    why_held,
)

_PAGE_RANKS = 64
_rank_of = attrgetter("rank")


class _Kind(NamedTuple):
    """Equal for records that are alike: nothing is wrong with an instance whose ranks are alike
    but for their version, if it is complete and ready, and all have one version.
    """

    version: int
    state: RankState
    agreed: Hashable


class Roster:
    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.damaged: dict[str, RecordDamaged] = {}  # by key
        self.held: dict[int, RankRecord] = {}  # by rank: ended ones, whose memory a keeper keeps
        self._records: dict[int, RankRecord] = {}  # by rank; none has ended
        # The same, in order. A status takes the pages as they are, and a change makes a new one.
        self._pages: dict[int, Page] = {}
        self._kinds: dict[_Kind, set[int]] = {}  # the ranks of each
        self._holders: Counter[int] = Counter()  # by version: how many ranks can be read in it
        # by number: a page, and what its records said in a version before their present one
        self._past: dict[int, tuple[Page, int, Page]] = {}

    @property
    def records(self) -> Mapping[int, RankRecord]:
        return self._records

    def put(self, record: RankRecord) -> None:
        """The rank's record from now on, which must not have ended."""
        self.remove(record.rank)
        self.held.pop(record.rank, None)
        self._records[record.rank] = record
        self._turn(record.rank, (record,))
        self._kinds.setdefault(_kind(record), set()).add(record.rank)
        self._holders.update(_versions_of(record))

    def end(self, record: RankRecord) -> RankRecord | None:
        """Takes in a record that has ended, which is remembered if it is held. Returns the record
        that the rank had before, if that had not ended.
        """
        former = self.remove(record.rank)
        self.held.pop(record.rank, None)
        if record.held:
            self.held[record.rank] = record
        return former

    def remove(self, rank: int) -> RankRecord | None:
        """Forgets the rank's record, unless it has ended, and returns it."""
        record = self._records.pop(rank, None)
        if record is not None:
            self._turn(rank, ())
            kind = _kind(record)
            self._kinds[kind].remove(rank)
            if not self._kinds[kind]:
                del self._kinds[kind]
            for version in _versions_of(record):
                self._holders[version] -= 1
                if not self._holders[version]:
                    del self._holders[version]
        return record

    def _turn(self, rank: int, records: tuple[RankRecord, ...]) -> None:
        """The page of the rank, with these in its place."""
        number = rank // _PAGE_RANKS
        page: tuple[RankRecord, ...] = self._pages.get(number, ())
        start = bisect_left(page, rank, key=_rank_of)
        stop = start + (start < len(page) and page[start].rank == rank)
        self._pages[number] = Page(page[:start] + records + page[stop:])
        if not self._pages[number]:
            del self._pages[number]

    @property
    def _first(self) -> RankRecord:
        return self._pages[min(self._pages)][0]

    def damage(self, key: str, error: RecordDamaged) -> None:
        """The key holds no good record.

        A copy is kept: the error itself holds on to whatever its traceback has seen.
        """
        self.damaged[key] = type(error)(error.what, error.remedy, **error.details)

    def see(self, change: Change) -> None:
        """Takes in a change of one of the instance's keys, for a caller that needs to know only
        what is there afterwards.
        """
        self.damaged.pop(change.key, None)
        place = parse_record_key(change.key)
        if place is not None:
            self.remove(place[1])
            self.held.pop(place[1], None)
        if isinstance(change, Deletion):
            return
        try:
            if place is None:
                raise RecordDamaged(
                    f"the key {change.key} is not /engines/<instance>/<rank>", key=change.key
                )
            record = decode_item(change)
        except RecordDamaged as exc:
            self.damage(change.key, exc)
        else:
            if record.ended:
                self.end(record)
            else:
                self.put(record)

    @property
    def empty(self) -> bool:
        """Whether nothing is known of the instance: neither ranks nor what they have left."""
        return not (self._records or self.damaged or self.held)

    @property
    def state(self) -> InstanceState:
        """As in `status`, without looking at each record. Ranks that are held count for nothing."""
        if not self._records and not self.damaged:
            return InstanceState.GONE
        if self.damaged or self._common_version() is None:
            return InstanceState.DEGRADED
        # they are all of its kind, and no rank is beyond its world size
        first = self._first
        ready = first.state is RankState.READY and len(self._records) == first.world_size
        return InstanceState.READY if ready else InstanceState.DEGRADED

    def _common_version(self) -> int | None:
        """The newest version in which all ranks can be read, where they differ in nothing else:
        some may have gone on from it, and have retained it.
        """
        if len({(kind.state, kind.agreed) for kind in self._kinds}) != 1:
            return None
        count = len(self._records)
        return max((each for each, held in self._holders.items() if held == count), default=None)

    def holds(self, version: int) -> bool:
        """Whether every rank is there, ready, and can be read in the version."""
        return self.state is InstanceState.READY and self._holders[version] == len(self._records)

    def lacking(self, version: int) -> dict[int, str]:
        """The ranks that cannot be read in the version, and what is known of each instead."""
        if not self._records:
            return {}
        lacking = {
            rank: why_held(self.held[rank]) if rank in self.held else "not registered"
            for rank in self._missing()
        }
        for rank, record in self._records.items():
            if record.state is not RankState.READY:
                lacking[rank] = record.state.value
            elif version not in (held := _versions_of(record)):
                some = " and ".join(map(str, sorted(held)))
                lacking[rank] = f"version{'s' if len(held) > 1 else ''} {some}"
        return dict(sorted(lacking.items()))

    def status(self) -> InstanceStatus:
        """As the instance is now; later changes leave it alone. Of ranks that have gone on from
        the version that all have, the records say where that one is.
        """
        damaged = tuple(map(str, self.damaged.values()))
        held = tuple(self.held[rank] for rank in sorted(self.held))
        missing = self._missing()
        if not self._records:
            return InstanceStatus(self.instance, self.state, (), missing, damaged, held)
        common, differ = self._common_version(), self._versions()
        problems = (*damaged, *self._differences(), *(differ if common is None else ()))
        problems = (*problems, *self._states())
        some = (self._page_in(number, common) for number in sorted(self._pages))
        return InstanceStatus(self.instance, self.state, Pages(some), missing, problems, held)

    def _page_in(self, number: int, version: int | None) -> Page:
        """The page as it says where the version is, if there is one that all ranks have."""
        page = self._pages[number]
        if version is None or page.versions == {version}:
            return page
        if (kept := self._past.get(number)) and kept[0] is page and kept[1] == version:
            return kept[2]
        past = Page(one for record in page if (one := record.as_of(version)) is not None)
        self._past[number] = page, version, past
        return past

    def _missing(self) -> tuple[int, ...]:
        if not self._records and not self.held:
            return ()
        world_size = (self._first if self._records else self.held[min(self.held)]).world_size
        return tuple(
            rank
            for start in range(0, world_size, _PAGE_RANKS)
            if len(self._pages.get(start // _PAGE_RANKS, ())) < _PAGE_RANKS
            for rank in range(start, min(start + _PAGE_RANKS, world_size))
            if rank not in self._records
        )

    def _differences(self) -> Iterator[str]:
        """Where a rank is not as the first one is."""
        first = self._first
        agreed, kind = first.agreed(), _kind(first)
        others = (ranks for each, ranks in self._kinds.items() if each.agreed != kind.agreed)
        for rank in sorted(rank for ranks in others for rank in ranks):
            for field, value in self._records[rank].agreed().items():
                if value != agreed[field]:
                    ours, theirs = short(repr(value)), short(repr(agreed[field]))
                    yield f"rank {rank} has {field} {ours}, rank {first.rank} has {theirs}"

    def _versions(self) -> Iterator[str]:
        if len({kind.version for kind in self._kinds}) > 1:
            by_version = self._by("version", self._kinds)
            held = (f"{each} ({named(ranks)})" for each, ranks in sorted(by_version.items()))
            yield f"versions differ: {', '.join(held)}"

    def _states(self) -> Iterator[str]:
        """That of the lowest rank comes first."""
        by_state = self._by(
            "state", (kind for kind in self._kinds if kind.state is not RankState.READY)
        )
        for state, ranks in sorted(by_state.items(), key=lambda each: min(each[1])):
            yield f"{named(ranks)} {state.value}"

    def _by(self, field: str, kinds: Iterable[_Kind]) -> dict[Any, list[int]]:
        """The ranks of these kinds, by a field of the kind."""
        found: dict[Any, list[int]] = {}
        for kind in kinds:
            found.setdefault(getattr(kind, field), []).extend(self._kinds[kind])
        return found


def _versions_of(record: RankRecord) -> set[int]:
    return {record.version, *(one.version for one in record.retained)}


def _kind(record: RankRecord) -> _Kind:
    return _Kind(record.version, record.state, record.alike)


def instance_of(key: str) -> str:
    """The instance that a key under /engines/ belongs to, be it a record's or not."""
    return key.removeprefix(ENGINES).partition("/")[0]


@collector_paused
def assess_all(items: Iterable[KeyValue]) -> tuple[InstanceStatus, ...]:
    """Every instance that has keys among `items`, by name; not one whose ranks have all ended,
    unless some are held.

    What cannot be read is among its problems.
    """
    rosters: dict[str, Roster] = {}
    for item in items:
        name = instance_of(item.key)
        if name not in rosters:
            rosters[name] = Roster(name)
        rosters[name].see(item)
    return tuple(roster.status() for _, roster in sorted(rosters.items()) if not roster.empty)
