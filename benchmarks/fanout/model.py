"""How long one rank's weights take to N receivers, on paper. Pure.

docs/explanation/fan-out-times.md explains it.

All links have the same speed in either direction, independently of each other, and nothing but them
takes time, except for `start_s` and `notice_s`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


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


def joined(receivers: int, hop: float, unseen: int = 0) -> list[int | None]:
    """Whom each reads from by the rule of `sources.chain`: the least of readers + 1 + hop × depth,
    the earliest of equal ones.

    `hop` is in loads of one receiver that has a source for itself.

    `sources.chain` works out the choice of receivers that have no ticket yet, so that many at once
    come to the same tree as one after another. With `unseen` receivers do not: each knows nothing
    of that many before it.
    """
    parents: list[int | None] = []
    readers: Counter[int | None] = Counter()
    depths: dict[int | None, int] = {}
    seen: list[int | None] = [None]
    counted = 0
    depths[None] = 0
    for number in range(receivers):
        while counted < number - unseen:
            readers[parents[counted]] += 1
            seen.append(counted)
            counted += 1
        parent = min(seen, key=lambda place: 1 + readers[place] + hop * depths[place])
        parents.append(parent)
        depths[number] = depths[parent] + 1
    return parents
