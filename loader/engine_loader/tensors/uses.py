"""Which memory of this process is published and which is being filled, whatever engine serves it.

A load has the memory that it fills for itself. Published memory is filled only while its
publication says that it changes: in `update()`, or while the publication is still loading. Used by
`publish`, `load` and reads of files. Starts no thread.
"""

from __future__ import annotations

import bisect
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from engine_loader.errors import MemoryInUse
from engine_registry import TensorEntry

Runs = Sequence[tuple[int, int]]  # from where to where, in order; they neither overlap nor touch


def runs_of(entries: Iterable[TensorEntry]) -> Runs:
    """The memory of tensors. What lies beside them in the same allocation is not theirs."""
    runs: list[tuple[int, int]] = []
    for start, end in sorted(
        {(entry.addr, entry.addr + entry.nbytes) for entry in entries if entry.nbytes}
    ):
        if runs and start <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(runs[-1][1], end)
        else:
            runs.append((start, end))
    return runs


class Use:
    """Memory that a publication serves (`served`) or that a load fills."""

    def __init__(
        self, owner: str, runs: Runs, served: bool, changing: bool = False, held: bool = False
    ) -> None:
        """`owner` names it in messages.

        `changing`: a publication does not vouch for the bytes now. `held`: when this process has
        ended, another one will have the memory for itself.
        """
        self.owner = owner
        self.served = served
        self.changing = changing
        self.held = held
        self._runs = runs
        self._starts = [start for start, _ in runs]

    def overlaps(self, other: Use) -> bool:
        few, many = (self, other) if len(self._runs) <= len(other._runs) else (other, self)
        return any(many._holds_some_of(start, end) for start, end in few._runs)

    def _holds_some_of(self, start: int, end: int) -> bool:
        place = bisect.bisect_left(self._starts, end) - 1  # the last run that begins before `end`
        return place >= 0 and self._runs[place][1] > start


class _Uses:
    """All uses in this process. Every method either takes effect as a whole or raises MemoryInUse.

    A use ends with the object that stands for it: memory of a publication that was forgotten may be
    another tensor's by now.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: weakref.WeakSet[Use] = weakref.WeakSet()

    @contextmanager
    def fill(self, owner: str, runs: Runs) -> Iterator[Use]:
        """Memory that is filled until the end of the block, by nobody else."""
        use = Use(owner, runs, served=False)
        with self._lock:
            for other in self._beside(use):
                if not other.served:
                    raise MemoryInUse(
                        f"{owner} cannot fill memory that {other.owner} fills",
                        "wait for its end, or load into other tensors",
                    )
                if not other.changing:
                    raise MemoryInUse(
                        f"{owner} cannot fill memory that is published as {other.owner}",
                        "load inside that publication's update(), or into other tensors",
                    )
            self._uses.add(use)
        try:
            yield use
        finally:
            self.end(use)

    def serve(
        self, owner: str, runs: Runs, filled_by: Use | None = None, held: bool = False
    ) -> Use:
        """Memory that is published until `end`.

        With `filled_by`, which is the load that fills it, it is still changing.
        """
        use = Use(owner, runs, served=True, changing=filled_by is not None, held=held)
        with self._lock:
            for other in self._beside(use):
                if not other.served and other is not filled_by:
                    raise MemoryInUse(
                        f"{owner} cannot be published: {other.owner} fills its memory",
                        "wait for its end",
                    )
                if other.served and other.changing:
                    raise MemoryInUse(
                        f"{owner} cannot be published: {other.owner} is changing the same memory",
                        "wait for its end",
                    )
                if held and other.held:
                    raise MemoryInUse(
                        f"{owner} cannot be held: {other.owner} is held and has the same memory, "
                        "and two processes would have it afterwards",
                        "publish one of them without `hold_s`",
                    )
            self._uses.add(use)
        return use

    def change(self, use: Use) -> None:
        """A publication's memory may be filled from now on, until `keep`."""
        with self._lock:
            for other in self._beside(use):
                if other.served:
                    raise MemoryInUse(
                        f"{use.owner} cannot be updated: {other.owner} publishes the same "
                        "memory, and its readers would not notice",
                        "close that publication first",
                    )
            use.changing = True

    def keep(self, use: Use, filled_by: Use | None = None) -> None:
        """It has been filled: its publication vouches for the bytes again.

        `filled_by` is a load that has just done that.
        """
        with self._lock:
            for other in self._beside(use):
                if not other.served and other is not filled_by:
                    raise MemoryInUse(
                        f"{use.owner} is not complete: {other.owner} still fills its memory",
                        "wait for its end",
                    )
            use.changing = False

    def end(self, use: Use) -> None:
        """Any number of times."""
        with self._lock:
            self._uses.discard(use)

    def _beside(self, use: Use) -> list[Use]:
        return [other for other in self._uses if other is not use and other.overlaps(use)]


USES = _Uses()
