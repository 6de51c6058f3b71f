"""Finds ranks to read from and chooses among them, without those that were lost. Used by `load`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from engine_loader.errors import SourceLost, SourceUnreachable, WeightsMismatch
from engine_loader.loading.job import Job
from engine_loader.loading.lost import LostSources
from engine_loader.planning.plan import Planner
from engine_loader.sources.manifests import find_manifests
from engine_loader.sources.search import Search
from engine_loader.sources.selection import Choice, Fetched, Selection
from engine_loader.sources.source import SourceRank
from engine_loader.transfer.received import Received
from engine_registry import Manifest, RankRecord
from engine_registry.errors import InstanceIncomplete, InstanceNotFound, RegistryError
from engine_registry.holders.query import Holders
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


class Finder:
    """Searches as `search` says, and adds ranks that went meanwhile to `lost`."""

    def __init__(self, job: Job, search: Search, lost: LostSources, publishes: bool) -> None:
        """`publishes`: the rank that is filled registers, before it is read to, as what was found
        first.
        """
        self._job = job
        self._search = search
        self._lost = lost
        self._publishes = publishes
        self.crowded = False  # others are faster again and again: a source may have other readers
        self.seen: Holders | None = None  # found just now: the next choice is made among them

    def choose(
        self, deadline: float, received: Received, planner: Planner, own: RankRecord | None
    ) -> Choice | None:
        """Sources of one content: of that of `received` if there are any of it.

        None where all are lost. Waits until `deadline` for the first. `own` is the record of the
        rank that is filled, if it is registered. Raises what `Search.find` and `Selection.choose`
        raise.
        """
        search, seen = self._search, self.seen
        self.seen = None
        if self._publishes and own is None and not self._lost.incarnations:
            # only to know the content: it chooses anew when it has a place among those that load
            search = replace(search, pipelined=False, max_sources=1)
        try:
            found = search.find(deadline, self._lost.incarnations, own, received.content, seen)
        except SourceUnreachable:
            wider = self._choose_wider(received, planner, own)
            if wider is None:
                raise
            return wider
        if not found:
            return self._choose_wider(received, planner, own)
        selection = Selection(
            received.dst,
            self._sources,
            planner,
            digests=self._job.verify == "digest",
            max_sources=search.max_sources,
            engine=self._job.engine,
        )
        try:
            choice = selection.choose(found)
            return replace(choice, free_since=None) if self.crowded else choice
        except WeightsMismatch:
            if found.instances or not self._widen():
                raise
            return self.choose(deadline, received, planner, own)
        finally:
            self._lost.add(selection.gone)

    def _choose_wider(
        self, received: Received, planner: Planner, own: RankRecord | None
    ) -> Choice | None:
        """From all ranks of an instance together, if that is new, and one is ready now."""
        if not self._widen():
            return None
        try:
            return self.choose(0.0, received, planner, own)
        except (InstanceNotFound, InstanceIncomplete):
            return None

    def _widen(self) -> bool:
        """All ranks of an instance together may have what one has not. Whether that is new."""
        if not (self._search.by_rank and self._search.boxes):
            return False
        self._search = replace(self._search, by_rank=False, pipelined=False)
        return True

    def _sources(self, records: Sequence[RankRecord]) -> list[Fetched]:
        job, sources = self._job, list[Fetched]()
        manifests = find_manifests(job.registry, records)
        for record, found in zip(records, manifests, strict=True):
            if not isinstance(found, Manifest):
                sources.append(found)
                continue
            own = record.rank == job.rank
            try:
                sources.append(SourceRank(job.registry, job.engine, record, found, own, job.device))
            except SourceLost as exc:
                sources.append(exc)
        return sources

    def is_one_updated(self) -> bool:
        """Whether a source is being updated, and so worth waiting for; False if etcd is away."""
        try:
            return self._search.is_being_updated(self._lost.incarnations)
        except RegistryError as exc:
            log.info(
                "not known whether a source is being updated: %s",
                exc,
                extra=fields("updates_unknown", error=exc),
            )
            return False
