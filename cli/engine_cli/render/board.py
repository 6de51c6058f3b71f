"""What the live table of `engines watch` shows: from events and pull tickets to rows, as many as
there is room for. Pure.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine_cli.render.flows import Flows, progress_of, reader_of
from engine_cli.render.printable import printable
from engine_cli.render.states import UNRESPONSIVE, any_loads, rank_state_of, state_of
from engine_cli.render.tables import size
from engine_cli.render.texts import event_text, read_by, reads_from, some_of
from engine_registry import (
    Event,
    InstanceCleaned,
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    InstanceState,
    InstanceStatus,
    Pull,
    RankJoined,
    RankLost,
    RankRecord,
    RankState,
    RankUpdated,
)
from engine_registry.schema.printable import count

MAX_NEWS = 50
_WINDOW_S = 6.0  # what a speed is measured over; tickets are written once a second
_SILENCE_S = 3.0  # from then on nothing comes any more


@dataclass(frozen=True)
class Row:
    """`fraction` is for a bar, where something loads and has said how far it is."""

    name: str
    state: str
    fraction: float | None = None
    reads_from: str = ""
    speed: str = ""
    read_by: str = ""


@dataclass(frozen=True)
class _RankedRow:
    """A row that is shown if there is room: the least `importance` first."""

    importance: int
    row: Row


# A rank that loads and says how far it is comes before one that does not, so that what happens is
# what is seen.
_BUSY_INSTANCE, _LOADING, _LOAD, _INSTANCE, _BUSY_RANK, _RANK = range(6)


class Speeds:
    """How fast each load is, from how far it was when somebody looked."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[tuple[float, int]]] = {}

    def see(self, flows: Flows, now: float) -> None:
        """Loads that have ended are forgotten."""
        before, self._seen = self._seen, {}
        for reader, pulls in flows.by_reader.items():
            progress = progress_of(pulls)
            seen = before.get(reader) or deque()
            if progress and (not seen or progress.nbytes != seen[-1][1]):
                if (
                    seen and progress.nbytes < seen[-1][1]
                ):  # a source was lost, or this is the next load
                    seen.clear()
                seen.append((now, progress.nbytes))
            while len(seen) > 2 and now - seen[0][0] > _WINDOW_S:
                seen.popleft()
            self._seen[reader] = seen

    def of(self, reader: str, now: float) -> float:
        """Bytes a second."""
        seen = self._seen.get(reader)
        if not seen or len(seen) < 2 or now - seen[-1][0] > _SILENCE_S:
            return 0.0
        (first_at, first_nbytes), (last_at, last_nbytes) = seen[0], seen[-1]
        return (last_nbytes - first_nbytes) / max(1e-3, last_at - first_at)

    def total(self, now: float) -> float:
        return sum(self.of(reader, now) for reader in self._seen)


class Board:
    """Show it every event of a watch. Not thread-safe."""

    def __init__(self, narrowed: bool = False) -> None:
        """`narrowed`: the watch is of some instances. Of all loads, only those that read from them
        or fill them are shown.
        """
        self.narrowed = narrowed
        self._records: dict[str, dict[int, RankRecord]] = {}
        self._last: dict[str, InstanceStatus] = {}
        self._speeds = Speeds()
        self._now = 0.0
        self.flows = Flows((), ())
        self.news: deque[str] = deque(maxlen=MAX_NEWS)

    def see(self, event: Event | InstanceCleaned, at: str) -> None:
        self.note(event_text(event), at)
        if isinstance(event, RankJoined | RankUpdated):
            self._records.setdefault(event.record.instance, {})[event.record.rank] = event.record
        elif isinstance(event, RankLost):
            self._records.get(event.record.instance, {}).pop(event.record.rank, None)
        elif isinstance(event, InstanceReady | InstanceDegraded):
            self._last[event.status.instance] = event.status
        elif isinstance(event, InstanceGone):
            self._last.pop(event.status.instance, None)
            self._records.pop(event.status.instance, None)

    def note(self, text: str, at: str) -> None:
        self.news.append(f"{at}  {printable(text)}")

    def look(self, pulls: Iterable[Pull], now: float) -> None:
        """What the rows are made of: the tickets as they are at the time `now`, of any clock."""
        records = (record for ranks in self._records.values() for record in ranks.values())
        self.flows = Flows(records, (pull for pull in pulls if self._is_ours(pull)))
        self._speeds.see(self.flows, now)
        self._now = now

    def _is_ours(self, pull: Pull) -> bool:
        return (
            not self.narrowed
            or pull.instance in self._records
            or (pull.reader is not None and pull.reader.instance in self._records)
        )

    def summary(self) -> str:
        records = [record for ranks in self._records.values() for record in ranks.values()]
        states = Counter(map(rank_state_of, records))
        names = [*(state.value for state in RankState), UNRESPONSIVE]
        counted = ", ".join(f"{states[name]:,} {name}" for name in names if states[name])
        parts = [
            f"{count(len(self._instances), 'instance')}, "
            f"{count(len(records), 'rank')}{f': {counted}' if counted else ''}"
        ]
        if self.flows.by_reader:
            speed = self._speeds.total(self._now)
            loads = count(len(self.flows.by_reader), "load")
            parts.append(f"{loads} at {size(speed)}/s" if speed else loads)
        return "; ".join(parts)

    @property
    def _instances(self) -> list[str]:
        return sorted(self._last.keys() | {name for name, ranks in self._records.items() if ranks})

    def rows(self, room: int) -> list[Row]:
        """At most so many.

        Ranks at rest are left out unless all have room; of all else the last row says how many
        there are.
        """
        found = [
            each for name in self._instances for each in self._of_instance(name)
        ] + self._of_strangers()
        if len(found) > room:
            found = [each for each in found if each.importance != _RANK]
        if len(found) <= room:
            return [each.row for each in found]
        kept = sorted(range(len(found)), key=lambda number: found[number].importance)[
            : max(0, room - 1)
        ]
        left_out = [found[number].row for number in sorted(set(range(len(found))) - set(kept))]
        return [*(found[number].row for number in sorted(kept)), _rest(left_out)][:room]

    def _of_instance(self, name: str) -> list[_RankedRow]:
        """A row for it, and one for each rank, unless there can only be one."""
        records = [record for _, record in sorted(self._records.get(name, {}).items())]
        if len(records) == 1 and records[0].world_size == 1:
            importance, row = self._rank(records[0], name)
            return [_RankedRow(_LOADING if importance is _LOADING else _INSTANCE, row)]
        ranks = [_RankedRow(*self._rank(record, f"  {name}/{record.rank}")) for record in records]
        return [self._whole(name, records), *ranks]

    def _whole(self, name: str, records: Sequence[RankRecord]) -> _RankedRow:
        last = self._last.get(name)
        loads = any_loads(records)
        known = InstanceStatus(name, last.state if last else InstanceState.DEGRADED, tuple(records))
        state = state_of(known)
        readers = {reader_of(pull) for record in records for pull in self.flows.readers(record)}
        reads = [pull for record in records for pull in self.flows.reads(record)]
        speed = sum(self._speeds.of(record.incarnation, self._now) for record in records)
        row = Row(
            name,
            f"{state} {len(records)}/{records[0].world_size if records else '?'}",
            self.flows.loaded(known) if loads else None,
            some_of(sorted({pull.instance for pull in reads})) if reads else "",
            f"{size(speed)}/s" if speed else "",
            count(len(readers), "load") if readers else "",
        )
        return _RankedRow(_INSTANCE if state == "ready" else _BUSY_INSTANCE, row)

    def _rank(self, record: RankRecord, name: str) -> tuple[int, Row]:
        reads, readers = self.flows.reads(record), self.flows.readers(record)
        loads = record.state is RankState.LOADING
        busy = reads or readers or rank_state_of(record) != RankState.READY.value
        importance = _LOADING if loads and reads else _BUSY_RANK if busy else _RANK
        row = self._reading(name, rank_state_of(record), reads, bar=loads)
        return importance, Row(
            row.name,
            row.state,
            row.fraction,
            row.reads_from,
            row.speed,
            read_by(readers) if readers else "",
        )

    def _of_strangers(self) -> list[_RankedRow]:
        """Loads into processes that are no rank, or one of an instance that is not watched."""
        some = sorted(self.flows.strangers().items())
        return [
            _RankedRow(_LOAD, self._reading(name, "load", pulls, bar=True)) for name, pulls in some
        ]

    def _reading(self, name: str, state: str, pulls: Sequence[Pull], bar: bool) -> Row:
        if not pulls:
            return Row(name, state)
        progress = progress_of(pulls)
        speed = self._speeds.of(reader_of(pulls[0]), self._now)
        return Row(
            name,
            state,
            progress.fraction if progress and bar else None,
            reads_from(pulls),
            f"{size(speed)}/s" if speed else "",
        )


def _rest(rows: Sequence[Row]) -> Row:
    states = Counter(row.state.partition(" ")[0] for row in rows)
    return Row(
        f"… and {len(rows):,} more",
        ", ".join(f"{count:,} {state}" for state, count in sorted(states.items())),
    )
