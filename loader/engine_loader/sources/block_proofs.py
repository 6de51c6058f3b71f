"""Proves blocks that came from ranks with other contents: by digests of what has come, beside those
that tables of sources have. Used by `loading.others`.

Starts one thread, which ends when the proofs are closed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from engine_loader.digests.parts import digests_of_parts
from engine_loader.planning.reads import Span
from engine_loader.planning.shared import Piece, Pieces
from engine_loader.sources.own_memory import OwnMemory
from engine_loader.sources.tables import Table
from engine_loader.tensors.cuda import on_default_stream


class Proven(NamedTuple):
    """Pieces whose blocks all are what the table says, and others."""

    right: list[Piece]
    wrong: list[Piece]


class BlockProofs:
    """Of the pieces of one transfer. `close` when it is over."""

    def __init__(
        self,
        pieces: Iterable[Piece],
        tables: Mapping[int, Table],
        memory: OwnMemory,
        device: torch.device,
    ) -> None:
        """`tables` are by the numbers of sources. `memory`, on the device, is what is filled."""
        self._pieces = Pieces(pieces)
        self._tables = tables
        self._memory = memory
        self._device = device
        self._pool = ThreadPoolExecutor(1, "digests of blocks")
        self._pending: list[Future[Proven]] = []

    def come(self, spans: Sequence[Span], lender: int | None = None) -> None:
        """As `Pieces.come`: begins to prove what is whole now."""
        by_source: defaultdict[int, list[Piece]] = defaultdict(list)
        for piece in self._pieces.come(spans, lender):
            by_source[piece.number].append(piece)
        for number, pieces in by_source.items():
            self._pending.append(self._pool.submit(self._prove, pieces, self._tables[number]))

    def proven(self, wait: bool = False) -> Proven:
        """What is known by now and was not told before; with `wait`, of all that has come."""
        found = Proven([], [])
        while self._pending and (wait or self._pending[0].done()):
            some = self._pending.pop(0).result()
            found.right.extend(some.right)
            found.wrong.extend(some.wrong)
        return found

    def _prove(self, pieces: Sequence[Piece], table: Table) -> Proven:
        blocks = [(piece, block) for piece in pieces for block in piece.blocks]
        parts = [
            part
            for _, block in blocks
            if (part := self._memory.part(block.addr, block.nbytes)) is not None
        ]
        with on_default_stream(self._device):
            digests = list(digests_of_parts(parts, table.algorithm))
        wrong = {
            piece.addr
            for (piece, block), digest in zip(blocks, digests, strict=True)
            if digest != table.digest(block.slot)
        }
        return Proven(
            [piece for piece in pieces if piece.addr not in wrong],
            [piece for piece in pieces if piece.addr in wrong],
        )

    def close(self) -> None:
        """Nothing looks at our memory any more when this returns."""
        self._pool.shutdown(cancel_futures=True)
