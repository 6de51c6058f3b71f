"""How long one rank's weights take to N receivers, on paper. Pure.

docs/explanation/fan-out-times.md explains it.

All links have the same speed in either direction, independently of each other, and nothing but them
takes time, except for `start_s` and `notice_s`.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from engine_loader.sources.chain import chain_length, costs
from engine_registry.holders.index import SAMPLE

_SEED = "seed"


@dataclass(frozen=True)
class Fabric:
    """`start_s`: from the beginning of a load until its first byte is asked for. `notice_s`: from
    when a receiver has a chunk until the next one asks for it. `in_flight_nbytes`: as much as a
    receiver asks for at once.
    """

    nbytes_per_s: float
    start_s: float = 0.0
    notice_s: float = 0.0
    in_flight_nbytes: float = 0.0

    @property
    def hop_s(self) -> float:
        """How much later than the one it reads from a receiver has its last chunk. What is asked
        for at once comes together, at the end of the time that all of it takes: there, and then
        here.
        """
        return self.notice_s + 2 * self.in_flight_nbytes / self.nbytes_per_s

    def one(self, nbytes: float) -> float:
        return self.start_s + nbytes / self.nbytes_per_s


def all_from_one(fabric: Fabric, nbytes: float, receivers: int) -> float:
    return fabric.start_s + receivers * nbytes / fabric.nbytes_per_s


def complete_then_chain(fabric: Fabric, nbytes: float, receivers: int) -> float:
    """A complete rank serves one after another: in each round as many get all as have it."""
    return math.ceil(math.log2(receivers + 1)) * fabric.one(nbytes)


def pipelined_chain(fabric: Fabric, nbytes: float, receivers: int) -> float:
    return pipelined_chains(fabric, nbytes, receivers, 1)


def pipelined_chains(fabric: Fabric, nbytes: float, receivers: int, chains: int) -> float:
    """Several that begin at the seed, which has to send all of them everything."""
    return (
        fabric.start_s
        + chains * nbytes / fabric.nbytes_per_s
        + (math.ceil(receivers / chains) - 1) * fabric.hop_s
    )


def pipelined_tree(fabric: Fabric, nbytes: float, receivers: int, degree: int) -> float:
    """Everybody, also the seed, serves up to `degree` others: each gets that part of a link."""
    depth, width, below = 0, 1, 0
    while below < receivers:
        depth, width = depth + 1, width * degree
        below += width
    return fabric.start_s + degree * nbytes / fabric.nbytes_per_s + (depth - 1) * fabric.hop_s


def depths_of(parents: Sequence[int | None]) -> list[int]:
    """How many links the weights go through to each receiver; `parents` has whom each reads from,
    None for the seed, and only such as come before it.
    """
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent is None else depths[parent] + 1)
    return depths


def pipelined(fabric: Fabric, nbytes: float, parents: Sequence[int | None]) -> float:
    """In any tree, all begun at once: a receiver gets its share of the link of whom it reads from,
    and nothing sooner than that.
    """
    readers = Counter(parents)
    ended: list[float] = []
    for parent in parents:
        alone = fabric.start_s + readers[parent] * nbytes / fabric.nbytes_per_s
        ended.append(alone if parent is None else max(alone, ended[parent] + fabric.hop_s))
    return max(ended, default=0.0)


def joined(
    receivers: int, hop: float, seed: int = 0, zones: Sequence[int] = ()
) -> list[int | None]:
    """Whom each reads from by the rule of `sources.chain`, where each sees a few of those before
    it, as `holders.look` brings them, and takes its place before the next one looks. All of them
    still load.

    `hop` is in loads of one receiver that has a source for itself. `zones` has the zone of each
    receiver; the seed is in zone 0. Without it there is one zone.
    """
    return joined_at_once(receivers, hop, 1, seed, zones)[0]


def joined_at_once(
    receivers: int, hop: float, at_once: int, seed: int = 0, zones: Sequence[int] = ()
) -> tuple[list[int | None], float]:
    """As `joined`, where so many at a time have looked and have no place yet, and any of them is
    the next one that takes its place. Also, how often etcd refuses a receiver: it looks again then.
    """
    chance = random.Random(seed)  # noqa: S311  no secret
    crowd = _Crowd(zones or [0] * receivers, hop, chance)
    chosen: dict[int, str] = {}
    looked: list[tuple[int, str, int]] = []  # the receiver, its source, and how many read from that
    refused, number = 0, 0
    while len(chosen) < receivers:
        while number < receivers and len(looked) < at_once:
            looked.append(crowd.look(number))
            number += 1
        receiver, source, seen = looked.pop(chance.randrange(len(looked)))
        if crowd.readers[source] != seen:
            refused += 1
            looked.append(crowd.look(receiver))
            continue
        crowd.readers[source] += 1
        chosen[receiver] = source
    sources = [chosen[receiver] for receiver in range(receivers)]
    return [None if one == _SEED else int(one) for one in sources], refused / receivers


def in_zones(receivers: int, zones: int, seed: int = 0) -> list[int]:
    """The zone of each, at random."""
    chance = random.Random(seed)  # noqa: S311  no secret
    return [chance.randrange(zones) for _ in range(receivers)]


def crossings(parents: Sequence[int | None], zones: Sequence[int]) -> int:
    """How many receivers read from another zone than theirs."""
    return sum(
        (0 if parent is None else zones[parent]) != zone
        for parent, zone in zip(parents, zones, strict=True)
    )


class _Crowd:
    """The receivers, in the order in which they join."""

    def __init__(self, zones: Sequence[int], hop: float, chance: random.Random) -> None:
        self.readers: Counter[str] = Counter()
        self._zones = zones
        self._hop = hop
        self._chance = chance
        self._members: defaultdict[int, list[int]] = defaultdict(list)
        for number, zone in enumerate(zones):
            self._members[zone].append(number)

    def look(self, number: int) -> tuple[int, str, int]:
        """The receiver, the source that it chooses, and how many read from that."""
        zone = self._zones[number]
        before: Sequence[int] = self._members[zone]
        ahead = bisect_left(before, number)
        if not ahead:
            before, ahead = range(number), number
        seen = [before[at] for at in range(ahead)[: -SAMPLE - 1 : -1]]
        if ahead > chain_length(self._hop):
            spread = [
                int((part + self._chance.random()) * ahead / SAMPLE) for part in range(SAMPLE)
            ]
            seen = [before[at] for at in dict.fromkeys(reversed(spread))]
        cost = costs(
            [_SEED],
            [str(one) for one in seen],
            self.readers,
            ahead=ahead,
            all_ready=True,
            hop=self._hop,
        )
        source = min(
            cost, key=lambda one: (self._zone_of(one) != zone, cost[one], self._chance.random())
        )
        return number, source, self.readers[source]

    def _zone_of(self, source: str) -> int:
        return 0 if source == _SEED else self._zones[int(source)]
