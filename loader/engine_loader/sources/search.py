"""Finds sources: of the ranks that have the weights, those that can be reached, the best first."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from engine_loader.engines.base import Engine
from engine_loader.errors import Cancelled, VersionUnavailable
from engine_loader.sources.chain import chain_length
from engine_loader.sources.groups import Found
from engine_loader.sources.ordering import Ordering
from engine_loader.sources.reach import is_reachable, reachable
from engine_loader.sources.readers import count_readers
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
from engine_registry.holders.query import HolderQuery, Holders
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
        self,
        deadline: float,
        avoid: Collection[str] = (),
        me: RankRecord | None = None,
        content: str = "",
        seen: Holders | None = None,
    ) -> Found:
        """Ranks to read from, all of one version of one model, in groups of one content. Waits
        until `deadline` for the first.

        `avoid` holds incarnations, `me` is the rank that is filled, if it is registered. A group of
        `content`, some of which has come, is the best. `seen` are holders that were found for `me`
        just now: then nobody is asked. Raises what `Registry.ready` raises,
        InvalidField (no such rank, or which one is meant is not clear), VersionUnavailable and
        SourceUnreachable; finds nothing only where all are to be avoided.
        """
        wait_s = max(0.0, deadline - time.monotonic())
        if seen is not None:
            holders: Holders | None = seen
            instances: Sequence[InstanceStatus] = seen.instances
        else:
            holders, instances = self._look(wait_s, avoid, me)
        instances = [status.as_of(self.version, self.contents) for status in instances]
        of_rank = [*holders.ready, *holders.loading] if holders is not None else []
        of_rank = list(map(self._as_wanted, of_rank))
        ready, alike = self._of_one_version(instances, of_rank)
        if not self.boxes:
            self._check_place(ready, alike)
        whole = [status.records for status in ready if self.boxes]
        usable = reachable(self.engine, whole, alike) - set(avoid)
        whole = [
            records for records in whole if all(record.incarnation in usable for record in records)
        ]
        alike = [record for record in alike if record.incarnation in usable]
        order = Ordering(self.registry, self.engine, self.max_sources)
        singles = (
            order.of_a_chain(alike, holders, self.hop)
            if holders is not None and holders.loading
            else order.of_ranks(alike, holders.readers if holders is not None else None)
        )
        together = order.of_instances(whole, self.dst)
        for groups in (singles, together):
            groups.sort(key=lambda group: group.content != content)
        return Found(singles, together, holders)

    def is_being_updated(self, avoid: Collection[str]) -> bool:
        """Whether a rank that could be read from is being changed now, and so worth waiting for."""
        if isinstance(self.wanted, ModelIdentity):
            rank = self.rank if self.by_rank and self.rank is not None else 0
            some = self.registry.updating(self.wanted, rank)
        else:
            names = [self.wanted] if isinstance(self.wanted, str) else self.wanted
            some = tuple(
                record for name in names for record in self.registry.instance(name).records
            )
        return any(
            record.state is RankState.UPDATING and record.incarnation not in avoid
            for record in some
            if self.boxes or self.place is None or self.place.fits(Place.of(record))
        )

    # -- what there is
    # ----------------------------------------------------------------------------------------------

    def _look(
        self, wait_s: float, avoid: Collection[str], me: RankRecord | None
    ) -> tuple[Holders | None, Sequence[InstanceStatus]]:
        """Of a rank those that hold it; else instances, or where nobody holds the rank."""
        try:
            if self.by_rank and isinstance(self.wanted, ModelIdentity) and self.place is not None:
                query = HolderQuery(
                    self.wanted,
                    Place(self.place.rank) if self.boxes else self.place,
                    lambda record: record.incarnation not in avoid and self._will_do(record),
                    self.version,
                    self.pipelined,
                    me,
                    chain_length(self.hop),
                    self.engine.location,
                )
                found = self.registry.holders(query, wait_s, self.cancel, boxes=self.boxes)
                return self._with_replicas(found, me), found.instances
            return None, self.registry.ready(
                self.wanted,
                wait_s,
                self.cancel,
                usable=lambda status: (
                    self._has_contents(status.as_of(self.version, self.contents))
                    and all(
                        record.incarnation not in avoid and is_reachable(self.engine, record)
                        for record in status.records
                    )
                ),
                version=self.version,
                near=self.engine.location,
            )
        except RegistryError as exc:
            if self.cancel is not None and self.cancel.is_set():
                raise Cancelled("the load was cancelled") from exc
            raise

    def _with_replicas(self, found: Holders, me: RankRecord | None) -> Holders:
        """And the ranks of our own instance that hold the same, as they differ along dp alone."""
        if (
            me is None
            or not self.boxes
            or not self.pipelined
            or me.topology.get("dp", (0, 1))[1] < 2
        ):
            return found
        replicas = [
            record
            for record in self.registry.ranks(me.instance)
            if _replicas(me, record)
            and (
                record.state is RankState.READY
                or (record.state is RankState.LOADING and record.began < me.began)
            )
        ]
        loading = [record for record in replicas if record.state is RankState.LOADING]
        return replace(
            found,
            ready=(*found.ready, *(record for record in replicas if record not in loading)),
            loading=tuple(
                sorted([*found.loading, *loading], key=lambda record: record.began, reverse=True)
            ),
            ahead=found.ahead + len(loading),
            readers={**(found.readers or {}), **count_readers(self.registry, replicas)},
        )

    def _as_wanted(self, record: RankRecord) -> RankRecord:
        """In the version and the content that are wanted, if it has retained them."""
        contents, content = self.contents, None
        if contents is not None and record.rank < len(contents):
            content = contents[record.rank]
        return record.as_of(self.version, content) or record

    def _will_do(self, record: RankRecord) -> bool:
        record = self._as_wanted(record)
        return (
            (self.version is None or record.version == self.version)
            and self._has_content(record)
            and is_reachable(self.engine, record)
        )

    def _has_content(self, record: RankRecord) -> bool:
        if self.contents is None:
            return True
        known = record.rank < len(self.contents)
        return record.content == (self.contents[record.rank] if known else "")

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
        wanted = None
        if self.contents is not None:
            wanted = self.contents[own.rank] if own.rank < len(self.contents) else ""
        return [
            record
            for record in [own, *others]
            if record.state is RankState.READY and wanted in (None, record.content)
        ]

    def _of_one_version(
        self, found: Sequence[InstanceStatus], of_rank: Sequence[RankRecord]
    ) -> tuple[list[InstanceStatus], list[RankRecord]]:
        """The instances that are ready, and the ranks alike, of the newest version that such an
        instance has, or else such a rank, if none is named.
        """
        ready = [
            status
            for status in found
            if status.state is InstanceState.READY and self._has_contents(status)
        ]
        holders = [record for record in of_rank if self._has_content(record)]
        holders += [record for status in found for record in self._holders(status)]
        every = [*(record for status in found for record in status.records), *of_rank]
        names = ", ".join(sorted({record.instance for record in every}))
        if self.contents is not None and not (ready or holders):
            raise VersionUnavailable(
                f"the weights that were wanted are not served any more: {names} "
                "has been updated or started again since",
                "load the weights that are served now",
                version=self.version,
                served=sorted({record.version for record in every}),
            )
        complete = [record for record in holders if record.state is RankState.READY]
        firsts = [status.records[0] for status in ready]
        served = sorted({record.version for record in [*firsts, *complete]})
        if self.version is not None:
            version = self.version
        elif firsts:
            version = max(record.version for record in firsts)
        else:
            version = self._of_a_whole_instance(complete)
        if version not in served:
            retained = {one.version for record in [*firsts, *complete] for one in record.retained}
            served = sorted({*served, *retained} - {version})
            raise VersionUnavailable(
                f"version {version} is not served: {names} has {', '.join(map(str, served))}",
                version=version,
                served=served,
            )
        model = next(record.model for record in [*firsts, *complete] if record.version == version)
        kind = version, model
        some = [status for status in ready if (status.version, status.model) == kind]
        return some, [record for record in holders if (record.version, record.model) == kind]

    def _of_a_whole_instance(self, complete: Sequence[RankRecord]) -> int:
        """The newest version that one of their instances has as a whole, if they differ: so all
        ranks of an engine get the same one while another engine is started with a newer. If none
        is whole, the newest.
        """
        versions = sorted({record.version for record in complete}, reverse=True)
        if len(versions) < 2:
            return versions[0] if versions else 0
        for record in sorted(complete, key=lambda record: -record.version):
            status = self.registry.instance(record.instance)
            if status.state is InstanceState.READY and status.version == record.version:
                return record.version
        return versions[0]

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


def _replicas(one: RankRecord, other: RankRecord) -> bool:
    """They differ in their place along dp and nowhere else."""
    return "dp" in one.topology and all(
        place == other.topology.get(axis) for axis, place in one.topology.items() if axis != "dp"
    )
