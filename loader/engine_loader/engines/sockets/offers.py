"""The regions that an engine offers, as rows of a table that readers of the same host see as well.

The head of the table is five words at an address that stays: two that identify it, the number of
changes, the number of rows, and the address of the rows, which are pieces in no order. A row that
is added is no change, as readers look again for what they do not find. While something is taken
away, or the rows move, the number of changes is odd.
"""

from __future__ import annotations

import secrets
import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine_loader.engines.sockets.memory import Pieces
from engine_registry.schema.manifest import Region

Words = npt.NDArray[np.uint64]
Offered = npt.NDArray[np.bool_]  # of each piece, whether it is

HEAD_WORDS = 5
ID, CHANGES, ROWS, ADDRESS = slice(0, 2), 2, 3, 4
AS_IT_WAS = slice(0, 3)  # words that stay the same as long as nothing is taken away


class Held(NamedTuple):
    """Regions that do not overlap, sorted by where they start."""

    starts: Words
    ends: Words

    @classmethod
    def of(cls, rows: Pieces) -> Held:
        rows = rows[np.argsort(rows[:, 0])]
        return cls(rows[:, 0].copy(), rows.sum(axis=1))

    def holds(self, pieces: Pieces) -> Offered:
        """Of each piece, whether it lies inside one region."""
        if not len(self.starts):
            return np.zeros(len(pieces), np.bool_)
        starts, ends = pieces[:, 0], pieces[:, 0] + pieces[:, 1]
        place = np.searchsorted(self.starts, starts, side="right") - 1
        inside = (place >= 0) & (ends >= starts)  # no sum of theirs runs over
        return np.asarray(inside & (ends <= self.ends[np.maximum(place, 0)]), np.bool_)


class Offers:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.head: Words = np.zeros(HEAD_WORDS, np.uint64)
        self.head[ID] = np.frombuffer(secrets.token_bytes(16), np.uint64)
        self._rows: Pieces = np.empty((0, 2), np.uint64)
        self._row_of: dict[int, int] = {}  # by where the region starts
        self._held: Held | None = None  # the same, sorted, until they change

    @property
    def id(self) -> bytes:
        return self.head[ID].tobytes()

    def add(self, region: Region) -> None:
        with self._lock:
            count = len(self._row_of)
            if count == len(self._rows):
                self._grow(count)
            self._rows[count] = region.addr, region.nbytes
            self._row_of[region.addr] = count
            self._held = None
            self.head[ROWS] = count + 1

    def _grow(self, count: int) -> None:
        rows = np.empty((max(64, 2 * count), 2), np.uint64)
        rows[:count] = self._rows
        self.head[CHANGES] += np.uint64(1)
        self._rows, self.head[ADDRESS] = rows, rows.ctypes.data
        self.head[CHANGES] += np.uint64(1)

    def remove(self, region: Region) -> None:
        """Once this returns, nobody of this host takes what it reads of the region for good."""
        with self._lock:
            row = self._row_of.pop(region.addr)
            last = len(self._row_of)
            self.head[CHANGES] += np.uint64(1)
            self._rows[row] = self._rows[last]
            self.head[ROWS] = last
            self.head[CHANGES] += np.uint64(1)
            if row != last:
                self._row_of[int(self._rows[row, 0])] = row
            self._held = None

    def held(self) -> Held:
        with self._lock:
            if self._held is None:
                self._held = Held.of(self._rows[: len(self._row_of)])
            return self._held

    def end(self) -> None:
        """Nothing is offered any more, and never again."""
        with self._lock:
            self.head[:] = 0
            self._row_of.clear()
            self._held = None
