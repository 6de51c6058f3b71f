"""Finds sources: of the ranks that have the weights, those that can be reached, the best first."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine_loader.engines.base import Engine
from engine_loader.errors import Cancelled, VersionUnavailable
from engine_loader.planning.content import content_of_parts
from engine_loader.sources.chain import costs
from engine_loader.sources.groups import Found, Group, grouped
from engine_loader.sources.reach import reachable
from engine_loader.sources.readers import all_pulls, best_first
from engine_registry import (
    InstanceState,
    InstanceStatus,
    Manifest,
    ModelIdentity,
    Place,
    RankRecord,
    RankState,
    Registry,
)
from engine_registry.errors import InvalidField, RegistryError
from engine_registry.watching.waiting import Wanted


@dataclass(frozen=True)
class Search:
    """What is looked for, however often.

    With `boxes`, what is filled says which part of the whole it is: then ranks that differ from
    `place` along the axis dp may hold the same, all ranks together may have it, and there need not
    be such a rank. Without, only ranks at the place will do. `contents` are those that the ranks of
    the source have to have, by rank. `by_rank`: of a model's instances the rank will do, whatever
    else of them there is. `pipelined`: so will ranks that are loading themselves; to read from one
    costs, besides, `hop` times what a load takes for each rank that its weights have gone through.
    `cancel` ends the wait for the first one.
    """

    registry: Registry
    engine: Engine
    wanted: Wanted
    place: Place | None
    dst: Manifest
    boxes: bool
    version: int | None = None
    contents: Sequence[str] | None = None
    max_sources: int = 4
    by_rank: bool = False
    pipelined: bool = False
    hop: float = 0.0
    cancel: threading.Event | None = None

    @property
    def rank(self) -> int | None:
        return self.place.rank if self.place is not None else None

    def find(
        self, deadline: float, avoid: Collection[str] = (), me: str = "", content: str = ""
    ) -> Found:
        """Ranks to read from, all of one version of one model, in groups of one content. Waits
        until `deadline` for the first.

        `avoid` holds incarnations, `me` is the one of the rank that is filled, if it is registered.
        A group of `content`, some of which has come, is the best. Raises what `Registry.ready`
        raises, InvalidField (no such rank, or which one is meant is not clear), VersionUnavailable
        and SourceUnreachable; finds nothing only where all are to be avoided.
        """
        found = self._look(max(0.0, deadline - time.monotonic()))
        every = {record.incarnation: record for status in found for record in status.records}
        ready, alike = self._of_one_version(found)
        if not self.boxes:
            self._check_place(ready, alike)
        whole = [status.records for status in ready if self.boxes]
        alike = _before(every.get(me), alike) if me else alike
        usable = reachable(self.engine, whole, alike) - set(avoid)
        whole = [
            records for records in whole if all(record.incarnation in usable for record in records)
        ]
        alike = [record for record in alike if record.incarnation in usable]
        instances = self._groups_of_instances(whole)
        if any(record.state is RankState.LOADING for record in alike):
            singles = self._groups_in_chain(alike, every.keys() - set(avoid), me)
        else:
            singles = grouped(
                [
                    ((record,), record.content)
                    for record in best_first(self.registry, self.engine, alike)
                ],
                self.max_sources,
            )
        for groups in (singles, instances):
            groups.sort(key=lambda group: group.content != content)
        return Found(singles, instances)

    def is_being_updated(self, avoid: Collection[str]) -> bool:
        """Whether a rank that could be read from is being changed now, and so worth waiting for."""
        if isinstance(self.wanted, ModelIdentity):
            some = [status for status in self.registry.instances() if status.model == self.wanted]
        else:
            names = [self.wanted] if isinstance(self.wanted, str) else self.wanted
            some = [self.registry.instance(name) for name in names]
        return any(
            record.state is RankState.UPDATING and record.incarnation not in avoid
            for status in some
            for record in status.records
            if self.boxes or self.place is None or self.place.fits(Place.of(record))
        )

    def _check_place(self, ready: Sequence[InstanceStatus], alike: Sequence[RankRecord]) -> None:
        """InvalidField unless there is such a rank, and the same one is meant wherever there is."""
        if not alike:
            sizes = ", ".join(
                f"{status.instance!r} has the ranks 0 to {status.world_size - 1}"
                for status in ready
            )
            raise InvalidField(f"there is no {self.place}: {sizes}", field="rank")
        places = [Place.of(record) for record in alike]
        other = next((place for place in places if not place.fits(places[0])), None)
        if other is not None:
            raise InvalidField(
                f"which rank is meant is not clear: {alike[0].key} is {places[0]}, "
                f"{alike[places.index(other)].key} is {other}, "
                "and their tensors do not say which part of the whole they are",
                "say world_size and topology",
                field="topology",
            )

    def _groups_of_instances(self, whole: Sequence[tuple[RankRecord, ...]]) -> list[Group]:
        firsts = {
            record.incarnation: at
            for at, record in enumerate(
                best_first(self.registry, self.engine, [records[0] for records in whole])
            )
        }
        ordered = sorted(whole, key=lambda records: firsts[records[0].incarnation])
        contents = [tuple([record.content for record in records]) for records in ordered]
        derived = {some: content_of_parts(some, self.dst) for some in set(contents)}
        return grouped(
            [(records, derived[some]) for records, some in zip(ordered, contents, strict=True)],
            self.max_sources,
        )

    def _look(self, timeout_s: float) -> Sequence[InstanceStatus]:
        try:
            if self.by_rank and isinstance(self.wanted, ModelIdentity) and self.place is not None:
                anywhere = Place(self.place.rank) if self.boxes else self.place
                return self.registry.holders(self.wanted, anywhere, timeout_s, self.cancel)
            return self.registry.ready(self.wanted, timeout_s, self.cancel)
        except RegistryError as exc:
            if self.cancel is not None and self.cancel.is_set():
                raise Cancelled("the load was cancelled") from exc
            raise

    def _of_one_version(
        self, found: Sequence[InstanceStatus]
    ) -> tuple[list[InstanceStatus], list[RankRecord]]:
        """The instances that are ready, and the ranks alike, of the newest version that such an
        instance has, or else such a rank, if none is named.
        """
        ready = [
            status
            for status in found
            if status.state is InstanceState.READY and self._has_contents(status)
        ]
        holders = [record for status in found for record in self._holders(status)]
        if self.contents is not None and not (ready or holders):
            raise VersionUnavailable(
                "the weights that were wanted are not served any more: "
                f"{', '.join(sorted(status.instance for status in found))} "
                "has been updated or started again since",
                "load the weights that are served now",
                version=self.version,
                served=sorted({record.version for status in found for record in status.records}),
            )
        complete = [record for record in holders if record.state is RankState.READY]
        firsts = [status.records[0] for status in ready]
        version = (
            max([record.version for record in firsts or complete], default=0)
            if self.version is None
            else self.version
        )
        served = sorted({record.version for record in [*firsts, *complete]})
        if version not in served:
            raise VersionUnavailable(
                f"version {version} is not served: "
                f"{', '.join(sorted(status.instance for status in found))} "
                f"has {', '.join(map(str, served))}",
                version=version,
                served=served,
            )
        model = next(record.model for record in [*firsts, *complete] if record.version == version)
        kind = version, model
        some = [status for status in ready if (status.version, status.model) == kind]
        return some, [record for record in holders if (record.version, record.model) == kind]

    def _has_contents(self, status: InstanceStatus) -> bool:
        return self.contents is None or status.contents == tuple(self.contents)

    def _holders(self, status: InstanceStatus) -> list[RankRecord]:
        own = next((record for record in status.records if record.rank == self.rank), None)
        if own is None or self.place is None or not (self.boxes or self.place.fits(Place.of(own))):
            return []
        others = [
            other
            for other in status.records
            if self.boxes and other is not own and _replicas(own, other)
        ]
        states = (RankState.READY, RankState.LOADING) if self.pipelined else (RankState.READY,)
        if self.contents is not None:
            wanted = self.contents[own.rank] if own.rank < len(self.contents) else ""
            return [
                record
                for record in [own, *others]
                if record.state in states and record.content == wanted
            ]
        return [record for record in [own, *others] if record.state in states]

    def _groups_in_chain(
        self, alike: Sequence[RankRecord], registered: Collection[str], me: str
    ) -> list[Group]:
        """The cheapest first. Of each group those that are complete and have no reader, at once."""
        pulls = all_pulls(self.registry)
        priced: list[tuple[float, int, Group]] = []
        for content in dict.fromkeys(record.content for record in alike):
            same = [record for record in alike if record.content == content]
            cost = costs(same, pulls, registered, self.hop, me)
            some = sorted(
                [record for record in same if record.incarnation in cost],
                key=lambda r: (cost[r.incarnation], r.create_revision),
            )
            if some:
                idle = sum(
                    record.state is RankState.READY and cost[record.incarnation] == 1
                    for record in some
                )
                group = Group(
                    content, [(record,) for record in some], min(max(idle, 1), self.max_sources)
                )
                priced.append((cost[some[0].incarnation], some[0].create_revision, group))
        return [group for _, _, group in sorted(priced, key=lambda one: one[:2])]


def _before(mine: RankRecord | None, alike: Sequence[RankRecord]) -> list[RankRecord]:
    """Those that are complete or began to load before me: so no rank reads from itself, by way of
    others.
    """
    limit = mine.create_revision if mine is not None else 0
    return [
        record
        for record in alike
        if record.state is not RankState.LOADING or record.create_revision < limit
    ]


def _replicas(one: RankRecord, other: RankRecord) -> bool:
    """They differ in their place along dp and nowhere else."""
    return "dp" in one.topology and all(
        place == other.topology.get(axis) for axis, place in one.topology.items() if axis != "dp"
    )
