"""What is known of one instance: its records as they come and go, counted, so that a change of one
rank costs the same however many there are. Pure; the tracker, a waiting resolve and the lists are
made of it.

`resolver.assess` says the same from all records at once. A roster asks it only when somebody wants
to know what is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

from engine_registry.errors import RecordDamaged
from engine_registry.schema.keys import ENGINES, parse_record_key
from engine_registry.schema.keyvalue import Change, Deletion, KeyValue
from engine_registry.schema.record import RankRecord, RankState
from engine_registry.schema.record_format import decode_item
from engine_registry.schema.status import InstanceState, InstanceStatus, assess


class Roster:
    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.damaged: dict[str, RecordDamaged] = {}  # by key
        self._records: dict[int, RankRecord] = {}  # by rank; none has ended
        self._kinds: Counter[Hashable] = Counter()  # how many records there are of each kind

    @property
    def records(self) -> Mapping[int, RankRecord]:
        return self._records

    def put(self, record: RankRecord) -> None:
        """The rank's record from now on, which must not have ended."""
        self.remove(record.rank)
        self._records[record.rank] = record
        self._kinds[_kind(record)] += 1

    def remove(self, rank: int) -> RankRecord | None:
        record = self._records.pop(rank, None)
        if record is not None:
            kind = _kind(record)
            self._kinds[kind] -= 1
            if not self._kinds[kind]:
                del self._kinds[kind]
        return record

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
            if not record.ended:
                self.put(record)

    @property
    def state(self) -> InstanceState:
        """As in `status`, without looking at each record."""
        if not self._records and not self.damaged:
            return InstanceState.GONE
        if self.damaged or len(self._kinds) > 1:
            return InstanceState.DEGRADED
        # they are all of its kind, and no rank is beyond its world size
        first = next(iter(self._records.values()))
        ready = first.state is RankState.READY and len(self._records) == first.world_size
        return InstanceState.READY if ready else InstanceState.DEGRADED

    def status(self) -> InstanceStatus:
        return assess(self.instance, self._records.values(), tuple(map(str, self.damaged.values())))


def _kind(record: RankRecord) -> Hashable:
    """Equal for records in which `assess` finds no difference."""
    agreed = (
        tuple(sorted(value.items())) if isinstance(value, dict) else value
        for value in record.agreed().values()
    )
    return (record.version, record.state, *agreed)


def instance_of(key: str) -> str:
    """The instance that a key under /engines/ belongs to, be it a record's or not."""
    return key.removeprefix(ENGINES).partition("/")[0]


def assess_all(items: Iterable[KeyValue]) -> tuple[InstanceStatus, ...]:
    """Every instance that has keys among `items`, by name.

    What cannot be read is among its problems.
    """
    rosters: dict[str, Roster] = {}
    for item in items:
        name = instance_of(item.key)
        if name not in rosters:
            rosters[name] = Roster(name)
        rosters[name].see(item)
    return tuple(
        roster.status()
        for _, roster in sorted(rosters.items())
        if roster.state is not InstanceState.GONE
    )
