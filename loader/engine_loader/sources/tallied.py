"""Digests of what an engine sums up as it reads, made while the rest still comes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine_loader.digests.table import NBYTES, digest_of_sums
from engine_loader.engines.tally import Tally
from engine_loader.sources.proofs import Group


class Tallied:
    """Of the pieces of one group of sources, whose tallies these are, one for each source at most.

    A piece that got some bytes twice has no digest, or a wrong one: what differs from the table has
    to be looked at again.
    """

    def __init__(self, group: Group, tallies: Sequence[Tally]) -> None:
        self._group = group
        self._tallies = tallies if group.apart else ()
        sizes = [group.pieces[number].nbytes for number in group.apart]
        self._sizes = np.array(sizes, np.int64)
        self._numbers: list[int] = []  # of pieces whose digests are known
        self._digests: list[bytes] = []
        self._known = np.zeros(len(sizes), np.bool_)

    def look(self) -> None:
        """At pieces that have come as a whole since the last look."""
        if not any(tally.has_news() for tally in self._tallies):
            return
        found = [tally.sums() for tally in self._tallies]
        packed = np.sum([sums for sums, _ in found], axis=0, dtype=np.int64).tobytes()
        nbytes = np.sum([nbytes for _, nbytes in found], axis=0)
        firsts = self._tallies[0].firsts
        whole = np.add.reduceat(nbytes, firsts) == self._sizes
        new = np.flatnonzero(whole & ~self._known)
        self._known[new] = True
        starts = 8 * firsts[new]
        ends = 8 * np.append(firsts, len(nbytes))[new + 1]
        sizes = self._sizes[new].tolist()
        for place, size, start, end in zip(
            new.tolist(), sizes, starts.tolist(), ends.tolist(), strict=True
        ):
            self._numbers.append(self._group.apart[place])
            self._digests.append(digest_of_sums(size, packed[start:end]))

    def equal_to(self, table: bytes) -> set[int]:
        """The numbers of the pieces whose digests are as the sources' table says."""
        self.look()
        slots = [self._group.slots[number] for number in self._numbers]
        theirs = np.frombuffer(table, np.uint64).reshape(-1, NBYTES // 8)[slots]
        ours = np.frombuffer(b"".join(self._digests), np.uint64).reshape(-1, NBYTES // 8)
        same = (theirs == ours).all(axis=1)
        return {number for number, one in zip(self._numbers, same.tolist(), strict=True) if one}
