"""Carries out the reads of a plan in batches that are bounded in number and bytes, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from loader.engine import MAX_BATCH, MAX_BATCH_NBYTES, Engine
from loader.plan import ReadOp


@dataclass(frozen=True)
class Progress:
    """How far a load is, in bytes of weights."""

    nbytes: int
    total_nbytes: int


OnProgress = Callable[[Progress], None]


def transfer(engine: Engine, session_id: str, ops: Sequence[ReadOp], done: list[ReadOp], on_progress: OnProgress) -> None:
    """Reads all `ops` from one peer; `done` grows by what has arrived, so that it is known also where ReadFailed comes."""
    total = sum(op.nbytes for op in ops)
    nbytes = 0
    for batch in batches(ops):
        engine.read(session_id, batch)
        done.extend(batch)
        nbytes += sum(op.nbytes for op in batch)
        on_progress(Progress(nbytes, total))


def batches(ops: Iterable[ReadOp]) -> Iterator[list[ReadOp]]:
    """The ops in their order, long ones cut, in batches within the engine's bounds."""
    batch: list[ReadOp] = []
    nbytes = 0
    for op in ops:
        for piece in _cut(op):
            if batch and (len(batch) == MAX_BATCH or nbytes + piece.nbytes > MAX_BATCH_NBYTES):
                yield batch
                batch, nbytes = [], 0
            batch.append(piece)
            nbytes += piece.nbytes
    if batch:
        yield batch


def _cut(op: ReadOp) -> Iterator[ReadOp]:
    for start in range(0, op.nbytes, MAX_BATCH_NBYTES):
        nbytes = min(MAX_BATCH_NBYTES, op.nbytes - start)
        yield ReadOp(op.source, op.src_addr + start, op.dst_addr + start, nbytes)
