"""From the ranks that were found, those that are read from: ranks that hold the same, or all that hold a part of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from loader.candidates import Candidate
from loader.errors import DigestsMissing, LoaderError, SourceLost, WeightsMismatch
from loader.garbage import collector_paused
from loader.manifests import for_each
from loader.offers import needed
from loader.plan import Planner, refuse
from loader.sources import Found, place_of
from registry import Manifest, RankRecord
from registry.logs import fields

log = logging.getLogger(__name__)


class Selection:
    """`candidate_of` fetches a rank's manifest, `planner` compares it with what is wanted."""

    def __init__(
        self,
        dst: Manifest,
        candidate_of: Callable[[RankRecord], Candidate],
        planner: Planner,
        *,
        digests: bool,
        max_sources: int,
        session_id: str,
    ) -> None:
        """`session_id`: the loader's own."""
        self._dst = dst
        self._candidate_of = candidate_of
        self._planner = planner
        self._digests = digests
        self._max_sources = max_sources
        self._session_id = session_id
        self.gone: list[RankRecord] = []

    @collector_paused
    def choose(self, found: Found) -> list[Candidate]:
        """Raises why not where nobody has it: WeightsMismatch, DigestsMissing or SourceLost."""
        misfits: list[LoaderError] = []
        alike = self._fitting([[record] for record in found.alike], misfits)
        if alike or not found.instances:
            return _those_or(alike, misfits)
        misfits.clear()
        teams = [sorted(records, key=lambda record: place_of(record, self._session_id)) for records in found.instances]
        parts = self._fitting(teams, misfits)
        numbers = needed([candidate.origin for candidate in parts], self._dst, self._max_sources) if parts else []
        return _those_or([parts[number] for number in numbers], misfits)

    def _fitting(self, teams: Sequence[Sequence[RankRecord]], misfits: list[LoaderError]) -> list[Candidate]:
        """The first teams each of which has all that is wanted, and digests of one kind if they are. Says why others do not fit."""
        chosen: list[list[Candidate]] = []
        algorithm: set[str] = set()
        for team in teams:
            if len(chosen) == self._max_sources:
                break
            try:
                candidates = for_each(team, self._fetch)
                origins = [candidate.origin for candidate in candidates]
                name = origins[0].name if len(team) == 1 else team[0].instance
                refuse(name, self._planner.differences(origins))
                theirs = {candidate.algorithm for candidate in candidates} if self._digests else set()
                if len(theirs) > 1:
                    kinds = " and ".join(sorted(theirs))
                    raise DigestsMissing(f'the ranks of {name} have digests of different kinds, {kinds}: load with verify="header"')
            except (WeightsMismatch, SourceLost, DigestsMissing) as exc:
                misfits.append(exc)
                continue
            algorithm = algorithm or theirs
            if theirs == algorithm:
                chosen.append(candidates)
        return [candidate for team in chosen for candidate in team]

    def _fetch(self, record: RankRecord) -> Candidate:
        try:
            return self._candidate_of(record)
        except SourceLost:
            self.gone.append(record)
            raise


def _those_or(candidates: list[Candidate], misfits: Sequence[LoaderError]) -> list[Candidate]:
    if not candidates:
        raise misfits[0]
    for misfit in misfits:
        log.info("not read from: %s", misfit, extra=fields("source_unfit", error=misfit))
    return candidates
