"""Reads of one peer's memory, each of one piece or of many, and those that a lane takes at once."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from engine_loader.engines.sockets.memory import Pieces, length_of
from engine_loader.engines.sockets.offers import Offered
from engine_loader.errors import ReadFailed
from engine_loader.planning.plan import ReadOp


class Read:
    """One that was begun. Once it is `over` nothing writes to its destination any more."""

    __slots__ = ("failure", "local", "nbytes", "op", "over", "peer", "remote")

    def __init__(self, peer: str, op: ReadOp) -> None:
        self.peer = peer
        self.op = op
        if op.pieces:
            src = op.src_addr
            self.remote = np.array([(src + one.src, one.nbytes) for one in op.pieces], np.uint64)
            self.local = np.array([(one.dst, one.nbytes) for one in op.pieces], np.uint64)
            self.nbytes = length_of(self.local)
        else:
            self.remote = np.array([(op.src_addr, op.nbytes)], np.uint64)
            self.local = np.array([(op.dst_addr, op.nbytes)], np.uint64)
            self.nbytes = op.nbytes
        self.over = False
        self.failure: ReadFailed | None = None  # if it has not brought all its bytes

    def end(self, failure: ReadFailed | None = None) -> None:
        self.failure = failure
        self.over = True


class Batch(NamedTuple):
    """Reads that a lane takes at once. `firsts` are the numbers of the first piece of each read."""

    reads: list[Read]
    firsts: list[int]
    local: Pieces
    remote: Pieces

    @classmethod
    def of(cls, reads: list[Read]) -> Batch:
        counts = [len(read.local) for read in reads]
        return cls(
            reads,
            [0, *itertools.accumulate(counts[:-1])],
            np.concatenate([read.local for read in reads]),
            np.concatenate([read.remote for read in reads]),
        )

    def came(self, offered: Offered) -> list[bool]:
        """Of each read, whether all of its pieces are offered."""
        return [bool(one) for one in np.logical_and.reduceat(offered, self.firsts)]
