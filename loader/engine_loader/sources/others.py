"""Ranks with other contents that may hold equal blocks: those that a load names, at the same places
as its sources. Used by attempts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

from engine_loader.engines.base import Engine
from engine_loader.engines.nearness import distance
from engine_loader.errors import LoaderError, SourceLost
from engine_loader.sources.reach import is_reachable
from engine_loader.sources.readers import best_first, count_readers
from engine_loader.sources.source import SourceRank
from engine_loader.transfer.pipe import Source
from engine_registry import ModelIdentity, Place, RankRecord, RankState, Registry
from engine_registry.holders.query import HolderQuery
from engine_registry.watching.waiting import Wanted

MOST = 16  # of a load, whatever its sources


class OtherRank(SourceRank):
    """One with another content than what is loaded. An update is a loss of it, and no reason to
    begin again.
    """

    def refuse(self, error: LoaderError) -> None:
        """Nothing more is read from it."""
        self._bad_news = error

    def for_transfer(self) -> Source:
        return replace(super().for_transfer(), lends=True)

    def _torn(self, now: str) -> LoaderError:
        error = super()._torn(now)
        return SourceLost(error.what, error.remedy, **error.details)


@dataclass(frozen=True)
class OtherSearch:
    """Among the ranks of `wanted`. With the sources of the load, these are `max_sources` at most
    for each place.
    """

    registry: Registry
    engine: Engine
    wanted: Wanted
    max_sources: int

    def find(self, sources: Sequence[RankRecord], avoid: Collection[str]) -> list[RankRecord]:
        """The best first. Sources of other zones do not count for `max_sources`; and there is none
        of another zone beside a rank of ours. `avoid` holds incarnations.

        Raises RegistryError.
        """
        contents = {record.content for record in sources}
        found: list[list[RankRecord]] = []
        for number in dict.fromkeys(record.rank for record in sources):
            near = sum(record.rank == number and not self._leaves(record) for record in sources)
            some = [
                record
                for record in self._of_rank(number, contents)
                if record.state is RankState.READY
                and record.incarnation not in avoid
                and not record.unresponsive_since
                and is_reachable(self.engine, record)
            ]
            best = best_first(some, count_readers(self.registry, some), self.engine)
            inside = [record for record in best if not self._leaves(record)]
            found.append((inside if inside or near else best)[: max(0, self.max_sources - near)])
        in_turn = chain.from_iterable(zip_longest(*found))
        return [record for record in in_turn if record is not None][:MOST]

    def _of_rank(self, number: int, contents: Collection[str]) -> list[RankRecord]:
        """A few of those with another content."""
        if isinstance(self.wanted, ModelIdentity):
            query = HolderQuery(self.wanted, Place(number), near=self.engine.location)
            return self._holders(query, contents)
        names = [self.wanted] if isinstance(self.wanted, str) else self.wanted
        return [
            record
            for name in names
            for record in self.registry.instance(name).records
            if record.rank == number and record.content not in contents
        ]

    def _holders(self, query: HolderQuery, contents: Collection[str]) -> list[RankRecord]:
        ready = self.registry.find_holders(query).ready
        others = [record for record in ready if record.content not in contents]
        if not others or len({record.version for record in ready}) == 1:
            return others
        # Beside a newer version the same few of an older one come each time: take a sample of it.
        query = replace(query, version=max(record.version for record in others))
        again = self.registry.find_holders(query).ready
        return [record for record in again if record.content not in contents]

    def _leaves(self, record: RankRecord) -> bool:
        return distance(record, self.engine)[0]
