"""Which rank to read from, where ranks that are still loading are sources too. Pure.

Each rank that loads has a place in an order that all see alike, and reads only from ranks that are
complete or come before it. A rank that joins goes through those before it in that order. For each
that has not taken its ticket yet, it finds out which source that rank will choose, as it would
itself. So of many ranks that begin at the same time, no two choose the same source because they did
not know of each other.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from engine_registry.schema.pull_ticket import Pull
from engine_registry.schema.record import RankRecord, RankState


def costs(
    records: Sequence[RankRecord],
    pulls: Iterable[Pull],
    registered: Collection[str],
    hop: float,
    me: str = "",
) -> dict[str, float]:
    """What it would cost to read from each of the records, ready or loading, by incarnation; lacks
    those that read from me.

    The unit is the time that all weights take from a source that nobody else reads from: as many
    times that as there would be readers, and `hop` for each rank that they have gone through
    before. `pulls` are all tickets of these ranks, `registered` the incarnations of all ranks there
    are: a ticket whose reader is none of them any more does not count. `me` is my own incarnation.
    """
    by_incarnation = {record.incarnation: record for record in records}
    readers: defaultdict[str, int] = defaultdict(int)
    parents: defaultdict[str, set[str]] = defaultdict(set)
    for pull in pulls:
        if pull.reader is None:
            readers[pull.incarnation] += 1
        elif pull.reader.incarnation in registered and pull.reader.incarnation != me:
            readers[pull.incarnation] += 1
            parents[pull.reader.incarnation].add(pull.incarnation)
    behind_me = _behind(me, parents)
    depths: dict[str, int] = {}
    cheapest: list[tuple[float, int, str]] = []  # a heap

    def offer(incarnation: str) -> None:
        cost = 1 + readers[incarnation] + hop * depths[incarnation]
        heapq.heappush(cheapest, (cost, by_incarnation[incarnation].create_revision, incarnation))

    for record in sorted(
        records, key=lambda record: (record.state is RankState.LOADING, record.create_revision)
    ):
        own = record.incarnation
        if record.state is not RankState.LOADING:
            depths[own] = 0
        elif known := parents[own] & by_incarnation.keys():
            depths[own] = 1 + max([depths.get(parent, 0) for parent in known])
        elif cheapest:
            parent = heapq.heappop(cheapest)[2]
            depths[own] = 1 + depths[parent]
            readers[parent] += 1
            offer(parent)
        else:
            depths[own] = 1
        offer(own)
    return {
        own: 1 + readers[own] + hop * depth for own, depth in depths.items() if own not in behind_me
    }


def _behind(me: str, parents: Mapping[str, Collection[str]]) -> set[str]:
    """The ranks that read from me, directly or by way of others; and me."""
    children: defaultdict[str, list[str]] = defaultdict(list)
    for child, some in parents.items():
        for parent in some:
            children[parent].append(child)
    behind: set[str] = set()
    ahead = [me]
    while ahead:
        one = ahead.pop()
        if one not in behind:
            behind.add(one)
            ahead += children[one]
    return behind
