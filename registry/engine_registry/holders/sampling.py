"""A few of the entries in one state, at random, near ones first. Stateless; used by `holders.look`.

At most two requests, however many entries there are.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from engine_registry.etcd.client import Etcd
from engine_registry.holders.index import SAMPLE, entries_of
from engine_registry.schema.holder import Entry, holders_prefix
from engine_registry.schema.keyvalue import Range, end_of, under
from engine_registry.schema.location import UNKNOWN, Location
from engine_registry.schema.record import ModelIdentity, RankState

NEAR = 2  # of a node, and of a rack, that are looked at beside others of the zone


@dataclass(frozen=True)
class Sample:
    """Some entries in one state.

    They are from `area`, the zone of whoever asks, or from everywhere if that is empty.
    `all_of_version`: there are no others there of the version of the first one. `are_all`: there
    are no others at all.
    """

    entries: list[Entry]
    all_of_version: bool
    are_all: bool
    area: str


@dataclass(frozen=True)
class _Part:
    """The first entries of an area; `are_all`: there are no others."""

    entries: list[Entry]
    are_all: bool

    def of(self, version: int) -> _Part:
        """Those of the version, which is the newest."""
        some = [entry for entry in self.entries if entry.version == version]
        return _Part(some, self.are_all or len(some) < len(self.entries))


def sample(
    etcd: Etcd,
    model: ModelIdentity,
    rank: int,
    state: RankState,
    version: int | None,
    near: Location = UNKNOWN,
) -> Sample:
    """Entries in the state, at random, of the newest version or the one that is named. Where there
    are few of the newest, some of the next come too.

    If all are of one version, and the zone of `near` has some of them, only those of that zone
    come. A few of the same node and rack are the first.
    """
    limits = dict.fromkeys(near.within_zone, NEAR) | {near.zone: SAMPLE, "": SAMPLE}
    _, found = etcd.read(
        [
            under(holders_prefix(model, rank, state, version, area), limit)
            for area, limit in limits.items()
        ]
    )
    first = {
        area: _Part(entries_of(each.items), each.count <= len(each.items))
        for area, each in zip(limits, found, strict=True)
    }
    versions = {entry.version for entry in first[""].entries}
    newest = max(versions, default=0)
    if len(versions) > 1:
        return Sample(_distinct(first.values())[: 2 * SAMPLE], True, first[""].are_all, "")
    area = near.zone if first[near.zone].of(newest).entries else ""
    parts = {each: first[each].of(newest) for each in (*near.within_zone, area)}
    crowded = {
        each: holders_prefix(model, rank, state, newest, each)
        for each, part in parts.items()
        if not part.are_all
    }
    if crowded:  # from a random one on, and round to the first ones
        start = secrets.token_hex(16)
        _, behind = etcd.read(
            [
                Range(prefix + start, end_of(prefix), limits[each])
                for each, prefix in crowded.items()
            ]
        )
        for each, some in zip(crowded, behind, strict=True):
            before = [entry for entry in parts[each].entries if entry.incarnation < start]
            parts[each] = _Part([*entries_of(some.items), *before][: limits[each]], False)
    return Sample(
        _distinct(parts.values())[:SAMPLE],
        parts[area].are_all,
        not area and first[""].are_all,
        area,
    )


def sample_retained(etcd: Etcd, model: ModelIdentity, rank: int, version: int) -> Sample:
    """Entries of ranks that have gone on from the version, and can still be read as they were."""
    prefix = holders_prefix(model, rank, RankState.READY, version, retained=True)
    _, (found,) = etcd.read([under(prefix, SAMPLE)])
    are_all = found.count <= len(found.items)
    return Sample(entries_of(found.items), are_all, are_all, "")


def _distinct(parts: Iterable[_Part]) -> list[Entry]:
    every = {entry.incarnation: entry for part in parts for entry in part.entries}
    return list(every.values())
