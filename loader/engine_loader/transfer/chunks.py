"""The chunks of a transfer: queued by the sources that hold them, counted until they are checked.
Used by `Transfer`, in its thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from engine_loader.errors import LoaderError
from engine_loader.planning.reads import Span
from engine_loader.transfer.pipe import Pipe
from engine_loader.transfer.progress import Progress, Silence


class Chunks:
    """`left_nbytes` are those that have not come; they may have come and not be checked."""

    def __init__(self, spans: Iterable[Span], chunk_nbytes: int) -> None:
        # by the numbers of the sources that hold what is in it
        self._queues: dict[tuple[int, ...], deque[Span]] = {}
        for span in spans:
            for chunk in span.cut(chunk_nbytes):
                self._queue_of(chunk).append(chunk)
        # chunks that are not checked yet
        self._left = {holders: len(queue) for holders, queue in self._queues.items()}
        self._total_nbytes = self.left_nbytes = sum(
            chunk.read_nbytes for queue in self._queues.values() for chunk in queue
        )

    def _queue_of(self, chunk: Span) -> deque[Span]:
        return self._queues.setdefault(_holders(chunk), deque())

    def queues_of(self, number: int) -> list[deque[Span]]:
        """Of what that source holds: what the fewest others hold comes first."""
        holding = sorted((holders for holders in self._queues if number in holders), key=len)
        return [self._queues[holders] for holders in holding]

    @property
    def left(self) -> int:
        """Chunks that are not checked yet."""
        return sum(self._left.values())

    @property
    def all_checked(self) -> bool:
        return not any(self._left.values())

    @property
    def queued(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    @property
    def came(self) -> float:
        """How much of all has come, from 0 to 1."""
        return 1 - self.left_nbytes / max(self._total_nbytes, 1)

    def progress(self, silent: tuple[Silence, ...]) -> Progress:
        return Progress(self._total_nbytes - self.left_nbytes, self._total_nbytes, silent)

    def put_back(self, chunks: Iterable[Span]) -> None:
        """They have to be read anew, before others."""
        for chunk in chunks:
            self._queue_of(chunk).appendleft(chunk)

    def count_checked(self, chunks: Iterable[Span]) -> None:
        for chunk in chunks:
            self._left[_holders(chunk)] -= 1

    def check_balance(self, in_pipes: int) -> None:
        """LoaderError if chunks are neither queued nor among those that pipes have."""
        left, found = self.left, self.queued + in_pipes
        if left != found:
            raise LoaderError(
                f"a transfer expects {left} more chunks, and has a place for {found}",
                "load again, and report this",
            )

    def lost(self, active: Sequence[Pipe]) -> bool:
        """Whether something is left that none of the active sources holds."""
        numbers = {pipe.number for pipe in active}
        return not numbers or any(
            left and numbers.isdisjoint(holders) for holders, left in self._left.items()
        )

    def can_spare(self, pipe: Pipe, active: Sequence[Pipe]) -> bool:
        """Others are left for all that it may have to bring; behind one that is loading itself
        there is one that is complete.
        """
        if pipe.source.stock is not None:
            return True
        others = {other.number for other in active if other is not pipe}
        held = (holders for holders, left in self._left.items() if left and pipe.number in holders)
        return bool(others) and not any(others.isdisjoint(holders) for holders in held)


def _holders(chunk: Span) -> tuple[int, ...]:
    return tuple([number for number, _ in chunk.srcs])
