"""From the ranks that were found, those that are read from: ranks that hold the same, or all that
hold a part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from engine_loader.engines.base import Engine
from engine_loader.engines.nearness import distance
from engine_loader.errors import DigestsMissing, LoaderError, SourceLost, WeightsMismatch
from engine_loader.planning.matching import needed
from engine_loader.planning.plan import Planner, refuse
from engine_loader.sources.groups import Found, Group
from engine_loader.sources.readers import order_of
from engine_loader.sources.source import SourceRank
from engine_registry import Manifest, RankRecord
from engine_registry.errors import RecordDamaged
from engine_registry.holders.query import Holders
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


Fetched = SourceRank | SourceLost | RecordDamaged  # an error is of a rank without its manifest


@dataclass(frozen=True)
class Choice:
    """Sources that are to be read from, and the content that they all bring.

    With `free_since`, a revision of etcd, it holds as long as nobody else has begun to read from
    them since. `holders` are those among whom it was made, if ranks of a model were looked for.
    """

    content: str
    sources: list[SourceRank]
    free_since: int | None = None
    holders: Holders | None = None


class Selection:
    """`sources_of` fetches the manifests of ranks, `planner` compares them with what is wanted."""

    def __init__(
        self,
        dst: Manifest,
        sources_of: Callable[[Sequence[RankRecord]], Sequence[Fetched]],
        planner: Planner,
        *,
        digests: bool,
        max_sources: int,
        engine: Engine,
    ) -> None:
        """`engine`: the loader's own."""
        self._dst = dst
        self._sources_of = sources_of
        self._planner = planner
        self._digests = digests
        self._max_sources = max_sources
        self._engine = engine
        self.gone: list[RankRecord] = []

    def choose(self, found: Found) -> Choice:
        """From the first group that has all that is wanted. Ranks whose process does not answer
        are chosen where no others have it: a stopped one brings nothing over TCP.

        Raises why not where none has: WeightsMismatch, DigestsMissing or SourceLost.
        """
        misfits: list[LoaderError] = []
        of_instances: list[LoaderError] = []
        for answering in (True, False):
            for group, teams in _teams(found.alike, answering):
                if fitting := self._fitting(group, teams, misfits):
                    since = group.free_since
                    choice = Choice(group.content, fitting, since, found.holders)
                    return _logged(choice, misfits)
            for group, teams in _teams(found.instances, answering):
                if parts := self._fitting(group, list(map(self._ordered, teams)), of_instances):
                    origins = [source.origin for source in parts]
                    far = [
                        number
                        for number, source in enumerate(parts)
                        if distance(source.record, self._engine)[0]
                    ]
                    numbers = needed(origins, self._dst, self._max_sources, far)
                    some = [parts[number] for number in numbers]
                    return _logged(Choice(group.content, some), of_instances)
        raise (of_instances or misfits)[0]

    def _ordered(self, records: Sequence[RankRecord]) -> list[RankRecord]:
        def order(record: RankRecord) -> tuple[bool, bool, float, bytes]:
            own = order_of(record, self._engine.session_id)
            return bool(record.unresponsive_since), *distance(record, self._engine), own

        return sorted(records, key=order)

    def _fitting(
        self, group: Group, teams: Sequence[Sequence[RankRecord]], misfits: list[LoaderError]
    ) -> list[SourceRank]:
        """The first teams each of which has all that is wanted, and digests of one kind if they
        are. Says why others do not fit.
        """
        chosen: list[SourceRank] = []
        algorithm: set[str] = set()
        missing = min(group.at_once, self._max_sources)
        rest = list(teams)
        while rest and missing:
            some, rest = rest[:missing], rest[missing:]
            for team, fetched in zip(some, self._fetch(some), strict=True):
                try:
                    sources = _all(fetched)
                    theirs = self._check(team, sources)
                except (WeightsMismatch, SourceLost, DigestsMissing) as exc:
                    misfits.append(exc)
                    continue
                algorithm = algorithm or theirs
                if theirs == algorithm:
                    chosen += sources
                    missing -= 1
        return chosen

    def _fetch(self, teams: Sequence[Sequence[RankRecord]]) -> list[Sequence[Fetched]]:
        """All at once; what was fetched for each team."""
        records = [record for team in teams for record in team]
        fetched = self._sources_of(records)
        self.gone += [
            record
            for record, one in zip(records, fetched, strict=True)
            if isinstance(one, SourceLost)
        ]
        each = iter(fetched)
        return [list(islice(each, len(team))) for team in teams]

    def _check(self, team: Sequence[RankRecord], sources: Sequence[SourceRank]) -> set[str]:
        """The kind of its digests, if they are wanted. Raises why it does not fit."""
        origins = [source.origin for source in sources]
        name = origins[0].name if len(team) == 1 else team[0].instance
        refuse(name, self._planner.differences(origins))
        algorithms = {source.algorithm for source in sources} if self._digests else set()
        if len(algorithms) > 1:
            kinds = " and ".join(sorted(algorithms))
            raise DigestsMissing(
                f"the ranks of {name} have digests of different kinds, {kinds}",
                'load with `verify="header"`',
            )
        return algorithms


def _teams(
    groups: Sequence[Group], answering: bool
) -> Iterator[tuple[Group, list[tuple[RankRecord, ...]]]]:
    """Of each group the teams all of whose ranks answer their keepers, or the others."""
    for group in groups:
        teams = [
            team
            for team in group.teams
            if answering is not any(record.unresponsive_since for record in team)
        ]
        if teams:
            yield group, teams


def _all(fetched: Sequence[Fetched]) -> list[SourceRank]:
    """Raises the first error."""
    sources = []
    for one in fetched:
        if isinstance(one, Exception):
            raise one
        sources.append(one)
    return sources


def _logged(choice: Choice, misfits: Sequence[LoaderError]) -> Choice:
    for misfit in misfits:
        log.info("not read from: %s", misfit, extra=fields("source_unfit", error=misfit))
    return choice
