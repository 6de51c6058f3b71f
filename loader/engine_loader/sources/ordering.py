"""The best source first: by how many read from it, how near it is, and how far down a chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine_loader.engines.base import Engine
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
        return grouped([((record,), record.content) for record in best], self.max_sources)

    def of_instances(self, whole: Sequence[tuple[RankRecord, ...]], dst: Manifest) -> list[Group]:
        """All ranks of each instance together; `dst` is what they fill."""
        firsts = [records[0] for records in whole]
        best = best_first(firsts, count_readers(self.registry, firsts), self.engine)
        place = {record.incarnation: at for at, record in enumerate(best)}
        ordered = sorted(whole, key=lambda records: place[records[0].incarnation])
        contents = [tuple([record.content for record in records]) for records in ordered]
        derived = {some: content_of_parts(some, dst) for some in set(contents)}
        return grouped(
            [(records, derived[some]) for records, some in zip(ordered, contents, strict=True)],
            self.max_sources,
        )

    def of_a_chain(self, alike: Sequence[RankRecord], holders: Holders, hop: float) -> list[Group]:
        """Ranks of which some still load: the cheapest first. Of each group those that are complete
        and have no reader, at once.
        """
        if holders.readers is None:
            log_unseen()
        readers = holders.readers or {}
        priced: list[tuple[float, int, Group]] = []
        for content in dict.fromkeys(record.content for record in alike):
            same = [record for record in alike if record.content == content]
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
            best = sorted(
                best_first(same, readers, self.engine), key=lambda one: cost[one.incarnation]
            )
            idle = sum(cost[record.incarnation] == 1 for record in ready)
            at_once = min(max(idle, 1), self.max_sources)
            group = Group(content, [(record,) for record in best], at_once, holders.revision)
            priced.append((cost[best[0].incarnation], len(priced), group))
        return [group for _, _, group in sorted(priced, key=lambda one: one[:2])]
