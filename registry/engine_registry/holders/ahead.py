"""Ranks that load the weights of a model and began before another: a few of them, near ones first.
Stateless; used by `holders.look`.
"""

from __future__ import annotations

import random
from dataclasses import replace

from engine_registry.etcd.client import Etcd
from engine_registry.holders.index import SAMPLE, entries_of
from engine_registry.holders.query import HolderQuery
from engine_registry.holders.sampling import NEAR
from engine_registry.schema.holder import Entry, holder_key, holders_prefix, loading_key
from engine_registry.schema.keyvalue import Range, end_of, under
from engine_registry.schema.record import RankRecord, RankState


def loading_before(etcd: Etcd, query: HolderQuery) -> tuple[list[Entry], int]:
    """Entries of ranks that load, the last to begin first, and how many there are in all: of those
    before `me` if it is registered, or else of all. From its zone, or where nobody loads there,
    from everywhere.
    """
    if query.me is not None and not query.me.order:
        return [], 0  # it is not in the index, so nobody knows who began before it
    entries, count = _loading_in(etcd, query, query.near.zone)
    if entries or not query.near.zone:
        return entries, count
    return _loading_in(etcd, query, "")


def _loading_in(etcd: Etcd, query: HolderQuery, area: str) -> tuple[list[Entry], int]:
    model, rank, me = query.model, query.place.rank, query.me
    if me is None:
        prefix = holders_prefix(model, rank, RankState.LOADING, query.version, area)
        _, (found,) = etcd.read([under(prefix, SAMPLE)])
        return entries_of(found.items), found.count
    before = _before(me, area)
    _, (found,) = etcd.read([replace(before, limit=SAMPLE)])
    entries = entries_of(found.items)
    if found.count <= query.chain or found.count <= len(found.items) or not entries:
        return entries, found.count
    # Ranks may share an order. Then only those whose incarnation follows ours began before.
    starts = [
        max(loading_key(model, rank, me.version, order, area), before.key)
        for order in _spread(me.order, entries[-1].order, len(entries), found.count)
    ]
    parts = zip(starts, [*starts[1:], before.end], strict=True)
    near = [replace(_before(me, area), limit=NEAR) for area in query.near.within_zone]
    _, some = etcd.read([*near, *(Range(start, end, 1) for start, end in parts if start < end)])
    spread = entries_of(item for part in some for item in part.items)
    every = {entry.incarnation: entry for entry in [*spread, *entries]}
    chosen = list(every.values())[:SAMPLE]
    return sorted(chosen, key=lambda entry: entry.order, reverse=True), found.count


def _before(me: RankRecord, area: str) -> Range:
    """Those in the area that began to load before the rank, the last to begin first."""
    mine = holder_key(replace(me, state=RankState.LOADING), area)
    prefix = holders_prefix(me.model, me.rank, RankState.LOADING, me.version, area)
    return Range(mine + "\0", end_of(prefix))


def _spread(mine: int, last: int, near: int, count: int) -> list[int]:
    """Orders before `mine`, as many as a sample has, one at random in each part of all `count`
    ranks; how far they reach back follows from the `near` ones just before, down to `last`.
    """
    part = (mine - last) / near * count / SAMPLE
    return [
        mine - round((number + random.random()) * part)  # noqa: S311  spreads load only
        for number in range(SAMPLE)
    ]
