"""Starts the reads of a transfer and collects those that are done, one source at a time. Used by
`Transfer`, in its thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from engine_loader.engines.base import Engine
from engine_loader.errors import ReadFailed
from engine_loader.planning.boxes import Lines
from engine_loader.planning.plan import ReadOp
from engine_loader.planning.reads import Span
from engine_loader.transfer.chunks import Chunks
from engine_loader.transfer.pace import Pace
from engine_loader.transfer.pipe import Flight, Pipe

# reads so small that the time is in their number: more of them may be in flight
_SMALL_NBYTES = 64 << 10


class Stage(Protocol):
    """Buffers for what cannot be read straight to its place."""

    def take(self) -> int | None:
        """The address of one that is free, if any is."""

    def give_back(self, addr: int) -> None: ...

    def copy(self, addr: int, lines: Sequence[Lines]) -> None:
        """From the buffer to where the lines say."""


def _runs(chunk: Span) -> tuple[Lines | None, tuple[Lines, ...]]:
    """Of a read straight to many places: at equal distances, or one by one."""
    if not chunk.direct:
        return None, ()
    first = chunk.lines[0]
    return (first._replace(dst=0), ()) if first.counts else (None, chunk.lines)


class Reads:
    def __init__(
        self,
        engine: Engine,
        pace: Pace,
        chunks: Chunks,
        stage: Stage | None,
        active: Sequence[Pipe],
    ) -> None:
        """`active`: the pipes that are read from, as long as the transfer keeps them there."""
        self._engine = engine
        self._pace = pace
        self._chunks = chunks
        self._stage = stage
        self._active = active

    def fill(self, pipe: Pipe, now: float) -> None:
        """Begins as many reads as may be in flight from the source."""
        lenders = set() if pipe.source.lends else self._lenders()
        for queue in pipe.queues:
            while queue:
                chunk = queue[0]
                if not pipe.has(chunk):
                    break
                limit = pipe.window if chunk.nbytes > _SMALL_NBYTES else self._pace.small_depth
                if lenders and any(number in lenders for number, _ in chunk.srcs):
                    limit = 1  # a slow one would end last with all that it has taken
                if len(pipe.in_flight) >= limit:
                    return
                staged = self._stage.take() if self._stage is not None and chunk.staged else None
                if chunk.staged and staged is None:
                    break  # until a buffer is free
                read = ReadOp(
                    pipe.source.name,
                    pipe.src_addr(chunk),
                    chunk.dst_addr if staged is None else staged,
                    chunk.nbytes,
                    *_runs(chunk),
                )
                try:
                    number = self._engine.start(pipe.source.peer, read)
                except ReadFailed as exc:
                    self._free(staged)
                    pipe.failure = exc
                    return
                queue.popleft()
                if not pipe.in_flight:
                    pipe.moved_at = now
                pipe.in_flight[number] = Flight(chunk, now, staged)

    def _lenders(self) -> set[int]:
        return {pipe.number for pipe in self._active if pipe.source.lends}

    def _free(self, staged: int | None) -> None:
        if staged is not None and self._stage is not None:
            self._stage.give_back(staged)

    def collect(self, pipe: Pipe, now: float) -> int:
        """How many bytes have come from the source since the last time."""
        came = 0
        for number, flight in list(pipe.in_flight.items()):
            try:
                if not self._engine.done(number):
                    if self._engine.in_order:
                        break
                    continue
            except ReadFailed as exc:
                pipe.failure = exc
                self.again(pipe, number)
                continue
            del pipe.in_flight[number]
            chunk = flight.chunk
            if flight.staged is not None and self._stage is not None:
                self._stage.copy(flight.staged, chunk.lines)
                self._stage.give_back(flight.staged)
            pipe.unchecked.append(chunk)
            pipe.share.nbytes += chunk.read_nbytes
            self._chunks.left_nbytes -= chunk.read_nbytes
            pipe.moved_at, pipe.silent_since = now, None
            pipe.failures = 0
            slow = now - flight.since > self._pace.slow_s
            pipe.window = (
                max(self._pace.least, pipe.window // 2)
                if slow
                else min(pipe.window + 1, self._pace.depth)
            )
            came += chunk.read_nbytes
        return came

    def again(self, pipe: Pipe, number: int) -> None:
        """What that read was to bring has to be read anew; the read is over."""
        flight = pipe.in_flight.pop(number)
        self._free(flight.staged)
        self.put_back([flight.chunk])

    def put_back(self, chunks: Iterable[Span]) -> None:
        """They are read anew, from any of the active sources that hold them."""
        self._chunks.put_back(chunks)
        for pipe in self._active:
            pipe.disordered = True
