"""The best source first: by how near it is, how many read from it, and how far down a chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import itemgetter

from engine_loader.engines.base import Engine
from engine_loader.engines.nearness import distance
from engine_loader.planning.content import content_of_parts
from engine_loader.sources.chain import costs
from engine_loader.sources.groups import Group, grouped
from engine_loader.sources.readers import best_first, count_readers, log_unseen
from engine_registry import Manifest, RankRecord, RankState, Registry
from engine_registry.holders.query import Holders


@dataclass(frozen=True)
class Ordering:
    """Of sources of the loader, which reads from `max_sources` at once at most."""

    registry: Registry
    engine: Engine
    max_sources: int

    def of_ranks(
        self, alike: Sequence[RankRecord], readers: Mapping[str, int] | None
    ) -> list[Group]:
        """Ranks that are complete; `readers` of each, if they have been counted."""
        if readers is None:
            readers = count_readers(self.registry, alike)
        best = best_first(alike, readers, self.engine)
        groups = grouped([((record,), record.content) for record in best], self.max_sources)
        return [replace(group, at_once=self._at_once(group.teams)) for group in groups]

    def of_instances(self, whole: Sequence[tuple[RankRecord, ...]], dst: Manifest) -> list[Group]:
        """All ranks of each instance together; `dst` is what they fill."""
        firsts = [records[0] for records in whole]
        best = best_first(firsts, count_readers(self.registry, firsts), self.engine)
        place = {record.incarnation: at for at, record in enumerate(best)}
        ordered = sorted(
            whole,
            key=lambda records: (self._leaving(records), place[records[0].incarnation]),
        )
        contents = [tuple([record.content for record in records]) for records in ordered]
        derived = {some: content_of_parts(some, dst) for some in set(contents)}
        groups = grouped(
            [(records, derived[some]) for records, some in zip(ordered, contents, strict=True)],
            self.max_sources,
        )
        return [replace(group, at_once=self._at_once(group.teams)) for group in groups]

    def of_a_chain(self, alike: Sequence[RankRecord], holders: Holders, hop: float) -> list[Group]:
        """Ranks of which some still load: those of our zone first, and of them the cheapest. Of
        each group those that are complete and have no reader, at once.
        """
        if holders.readers is None:
            log_unseen()
        contents = dict.fromkeys(record.content for record in alike)
        priced = [
            self._priced([record for record in alike if record.content == content], holders, hop)
            for content in contents
        ]
        return [group for _, group in sorted(priced, key=itemgetter(0))]

    def _priced(
        self, same: Sequence[RankRecord], holders: Holders, hop: float
    ) -> tuple[tuple[bool, float], Group]:
        """Ranks of one content, and what it costs to read from the best."""
        readers = holders.readers or {}
        ready = [record for record in same if record.state is RankState.READY]
        loading = [record for record in holders.loading if record in same]
        are_all = holders.ahead <= len(holders.loading)
        cost = costs(
            [record.incarnation for record in ready],
            [record.incarnation for record in loading],
            readers,
            ahead=len(loading) if are_all else holders.ahead,
            all_ready=holders.all_ready,
            hop=hop,
        )

        def whole_cost(record: RankRecord) -> tuple[bool, float]:
            leaves, far = distance(record, self.engine)
            return leaves, cost[record.incarnation] + far

        best = sorted(best_first(same, readers, self.engine), key=whole_cost)
        idle = list(takewhile(lambda record: cost[record.incarnation] == 1, best))
        teams = [(record,) for record in best]
        at_once = self._at_once(teams[: max(len(idle), 1)])
        group = Group(same[0].content, list(teams), at_once, holders.revision)
        return whole_cost(best[0]), group

    def _at_once(self, best: Sequence[tuple[RankRecord, ...]]) -> int:
        """How many of these teams are read from at the same time: none outside of our zone beside
        such as are in it.
        """
        inside = list(takewhile(lambda team: not self._leaving(team), best))
        return min(len(inside or best), self.max_sources)

    def _leaving(self, records: Sequence[RankRecord]) -> int:
        """How many of them are not in our zone."""
        return sum(distance(record, self.engine)[0] for record in records)
