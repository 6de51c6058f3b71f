"""Who reads from whom, of records and pull tickets: how far each rank is that loads, and the tree.
Pure.

Anybody may have written a ticket. Whatever they say of each other, the tree ends, and has as many
lines as there are pairs of a reader and a source, and ranks without a reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine_registry import InstanceStatus, ModelIdentity, Pull, RankRecord, RankState


@dataclass(frozen=True)
class Arrived:
    """In bytes; never more than all."""

    nbytes: int
    total_nbytes: int

    @property
    def fraction(self) -> float:
        return self.nbytes / self.total_nbytes


@dataclass(frozen=True)
class Line:
    """One of the tree.

    `again`: what is below it stands elsewhere. `parent` is its source here, if it has one.
    """

    depth: int
    name: str
    parent: str
    record: RankRecord | None
    progress: Arrived | None
    again: bool = False


class Flows:
    """Of all records that may be seen; a rank that is not among them is known by its ticket."""

    def __init__(self, records: Iterable[RankRecord], pulls: Iterable[Pull]) -> None:
        self.pulls = tuple(pulls)
        self._records = {record.incarnation: record for record in records}
        self._by_source: dict[str, list[Pull]] = {}
        self.by_reader: dict[str, list[Pull]] = {}
        for pull in self.pulls:
            self._by_source.setdefault(pull.incarnation, []).append(pull)
            self.by_reader.setdefault(reader_of(pull), []).append(pull)

    def readers(self, record: RankRecord) -> Sequence[Pull]:
        """What is read from the registration."""
        return self._by_source.get(record.incarnation, ())

    def reads(self, record: RankRecord) -> Sequence[Pull]:
        """What the rank reads itself."""
        return self.by_reader.get(record.incarnation, ())

    def progress(self, record: RankRecord) -> Arrived | None:
        """How far the rank's load is; None where it has none, or has not said."""
        return progress_of(self.reads(record))

    def participants(self) -> list[RankRecord]:
        """The known ranks that read, or are read from."""
        return [
            self._records[node]
            for node in self.by_reader.keys() | self._by_source.keys()
            if node in self._records
        ]

    def strangers(self) -> dict[str, Sequence[Pull]]:
        """What those read that are no rank that is known, by name."""
        return {
            name_of(pulls[0]): pulls
            for reader, pulls in self.by_reader.items()
            if reader not in self._records
        }

    def loaded(self, status: InstanceStatus) -> float | None:
        """Which part of its ranks' weights is there; None unless one of them loads and has said how
        far it is.
        """
        known = {
            record.rank: self.progress(record)
            for record in status.records
            if record.state is RankState.LOADING
        }
        if not any(known.values()) or not status.nbytes:
            return None
        whole_nbytes = sum(
            record.manifest.nbytes for record in status.records if record.rank not in known
        )
        parts = (
            record.manifest.nbytes * part.fraction
            for record in status.records
            if (part := known.get(record.rank)) is not None
        )
        return (whole_nbytes + sum(parts)) / status.nbytes

    def of_model(self, model: ModelIdentity) -> Flows:
        """What is read from, or by, the ranks that serve it."""
        ours = {
            incarnation for incarnation, record in self._records.items() if record.model == model
        }
        some = (pull for pull in self.pulls if pull.incarnation in ours or reader_of(pull) in ours)
        return Flows((self._records[incarnation] for incarnation in self._records), some)

    def tree(self) -> list[Line]:
        """Sources, and below each its readers.

        Complete ranks come first; a reader of several stands below each.
        """
        children: dict[str, dict[str, None]] = {}
        below: set[str] = set()
        for pull in self.pulls:
            children.setdefault(pull.incarnation, {})[reader_of(pull)] = None
            below.add(reader_of(pull))
        order = sorted(children.keys() | below, key=self._place)
        lines: list[Line] = []
        drawn: set[str] = set()
        for root in [
            *(node for node in order if node not in below),
            *order,
        ]:  # the latter for ranks that read in a circle
            waiting = [(root, "", 0)] if root not in drawn else []
            while waiting:
                node, parent, depth = waiting.pop()
                name, lower = self._name(node), children.get(node, {})
                again = node in drawn and bool(lower)
                lines.append(
                    Line(
                        depth,
                        name,
                        parent,
                        self._records.get(node),
                        progress_of(self.by_reader.get(node, ())),
                        again,
                    )
                )
                if node not in drawn:
                    drawn.add(node)
                    waiting += [
                        (each, name, depth + 1)
                        for each in sorted(lower, key=self._place, reverse=True)
                    ]
        return lines

    def trees_with(self, records: Iterable[RankRecord]) -> list[Line]:
        """Of the tree, what hangs together with one of them."""
        wanted = {record.incarnation for record in records}
        trees: list[list[Line]] = []
        for line in self.tree():
            if line.depth == 0:
                trees.append([])
            trees[-1].append(line)
        return [
            line
            for tree in trees
            if any(line.record and line.record.incarnation in wanted for line in tree)
            for line in tree
        ]

    def _name(self, node: str) -> str:
        record = self._records.get(node)
        if record is not None:
            return f"{record.instance}/{record.rank}"
        read = self.by_reader.get(node)
        return name_of(read[0]) if read else source_of(self._by_source[node][0])

    def _place(self, node: str) -> tuple[bool, bool, str, int, str]:
        """Complete ranks, ranks that load, all others; each by name."""
        record = self._records.get(node)
        if record is None:
            return True, True, self._name(node), 0, node
        return False, record.state is RankState.LOADING, record.instance, record.rank, node


def reader_of(pull: Pull) -> str:
    """Who reads: a registration, or a process that is none, which never has the name of one."""
    return pull.reader.incarnation if pull.reader is not None else f"{pull.host} {pull.pid}\n"


def name_of(pull: Pull) -> str:
    """Of the reader, for people."""
    if pull.reader is not None:
        return f"{pull.reader.instance}/{pull.reader.rank}"
    return f"{pull.host or '?'} pid {pull.pid or '?'}"


def source_of(pull: Pull) -> str:
    return f"{pull.instance}/{pull.rank}"


def progress_of(pulls: Sequence[Pull]) -> Arrived | None:
    """Of one reader: the progress in its newest ticket that has any."""
    known = [pull for pull in pulls if pull.total_nbytes]
    if not known:
        return None
    newest = max(known, key=lambda pull: (pull.create_revision, pull.nbytes))
    return Arrived(min(newest.nbytes, newest.total_nbytes), newest.total_nbytes)


def percent(fraction: float) -> str:
    """Rounded down: 100 % is all of it."""
    return f"{int(100 * fraction + 1e-6)} %"
