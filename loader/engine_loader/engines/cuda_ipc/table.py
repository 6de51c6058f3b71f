"""From reads to the rows of the table that the kernel copies. Pure: numpy only.

A row has, in elements of one size but for the two addresses:

    0 src, 1 dst    addresses where the run of the row's first element begins
    2 width         of a run
    3, 4            steps from a run to the next, at the source and here
    5 first         its first element, counted from the beginning of that run on
    6 count         of its elements
    7 slot          of the sum that they are added to, or -1
    8 ahead         words of that sum's block before them

So a row begins and ends at any element, also in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine_loader.planning.boxes import Lines
from engine_registry.schema.manifest import Region

Numbers = npt.NDArray[np.int64]
COLUMNS = 9
SRC, DST, WIDTH, SRC_STEP, DST_STEP, FIRST, COUNT, SLOT, AHEAD = range(COLUMNS)
_ROW_NBYTES = 512 << 10  # of a row: some rows for each of a GPU's processors, also of little
_LONG_NBYTES = 1 << 30  # runs of which are rows each for itself: the kernel counts in 32 bits
BLOCK_NBYTES = 4 << 20  # of a sum of `multilinear_64`


class Blocks:
    """Pieces of a source's memory, whose words are summed up, cut into blocks with a sum each."""

    def __init__(self, pieces: Sequence[Region]) -> None:
        """`pieces` do not overlap, begin at words and have whole words."""
        sizes = np.array([piece.nbytes for piece in pieces], np.int64)
        counts = -(-sizes // BLOCK_NBYTES)
        self.firsts = np.cumsum(counts) - counts  # of each piece: the slot of its first block
        self.whose = np.repeat(np.arange(len(pieces)), counts)  # of each slot: its piece
        ahead = (np.arange(len(self.whose)) - self.firsts[self.whose]) * BLOCK_NBYTES
        begins = np.array([piece.addr for piece in pieces], np.int64)[self.whose] + ahead
        ends = begins + np.minimum(sizes[self.whose] - ahead, BLOCK_NBYTES)
        self._order = np.argsort(begins)
        self._begins, self._ends = begins[self._order], ends[self._order]
        self.bounds = np.unique(np.concatenate([begins, ends]))

    def __len__(self) -> int:
        return len(self.whose)

    def touch(self, addr: int, nbytes: int) -> bool:
        """Whether any of these bytes belong to a piece."""
        place = np.searchsorted(self._begins, addr + nbytes) - 1
        return bool(place >= 0 and self._ends[place] > addr)

    def slots_of(self, begins: Numbers) -> tuple[Numbers, Numbers]:
        """Of bytes that begin there and reach across no bound: their slots, -1 where they belong to
        no piece; and how many bytes of the block come before them.
        """
        place = np.searchsorted(self._begins, begins, "right") - 1
        inside = (place >= 0) & (begins < self._ends[place])
        return (
            np.where(inside, self._order[place], -1),
            np.where(inside, begins - self._begins[place], 0),
        )


class Copy(NamedTuple):
    """Bytes at `src`, in the memory of this process, go to `dst`.

    `at` is where the source itself has them. `lines` as in ReadOp.
    """

    src: int
    dst: int
    at: int
    nbytes: int
    lines: Lines | None = None


@dataclass(frozen=True)
class Table:
    """The rows, by the bytes of an element."""

    rows: dict[int, Numbers]

    def added(self, slots: int) -> Numbers:
        """How many bytes go into each of so many sums."""
        nbytes = np.zeros(slots, np.int64)
        if (words := self.rows.get(4)) is not None:
            summed = words[words[:, SLOT] >= 0]
            np.add.at(nbytes, summed[:, SLOT], 4 * summed[:, COUNT])
        return nbytes


def table_of(copies: Sequence[Copy], blocks: Blocks | None = None) -> Table:
    """The rows that make these copies, none of which touches what another one writes."""
    if len(copies) == 1 and (row := _single_row(copies[0], blocks)):
        return Table({4: np.array([row], np.int64)})
    runs = _split_edges(_runs_of(copies))
    rows = {}
    units = _units(runs)
    for unit in (4, 2, 1):
        some = runs[units == unit]
        if len(some):
            rows[unit] = _rows(some, unit, blocks if unit == 4 else None)
    return Table(rows)


def _single_row(copy: Copy, blocks: Blocks | None) -> tuple[int, ...] | None:
    """Of a short copy of words that are not summed up, as headers are."""
    if copy.lines is not None or copy.nbytes > _ROW_NBYTES:
        return None
    if blocks is not None and blocks.touch(copy.at, copy.nbytes):
        return None
    if (copy.src | copy.dst | copy.nbytes) % 4:
        return None
    words = copy.nbytes // 4
    return copy.src, copy.dst, words, 0, 0, 0, words, -1, 0


# of runs: as of a row, in bytes, with the source's address of the first, and how many there are
_R_SRC, _R_DST, _R_AT, _R_WIDTH, _R_SRC_STEP, _R_DST_STEP, _R_RUNS = range(7)


def _runs_of(copies: Sequence[Copy]) -> Numbers:
    found: list[tuple[int, ...]] = []
    for copy in copies:
        lines = copy.lines
        if lines is None:
            found.append((copy.src, copy.dst, copy.at, copy.nbytes, 0, 0, 1))
            continue
        axes = len(lines.counts)
        for some in lines.along(axes - 1 if axes and lines.nbytes < _LONG_NBYTES else axes):
            steps = (some.src_steps[0], some.dst_steps[0], some.counts[0]) if some.counts else ()
            found.append(
                (
                    copy.src + some.src,
                    copy.dst + some.dst,
                    copy.at + some.src,
                    some.nbytes,
                    *(steps or (0, 0, 1)),
                )
            )
    return np.array(found, np.int64).reshape(-1, 7)


def _split_edges(runs: Numbers) -> Numbers:
    """Where both sides of a single run are off a word by as much, the bytes before the first word
    and behind the last one come apart, so that the rest are words.
    """
    src, dst, width = runs[:, _R_SRC], runs[:, _R_DST], runs[:, _R_WIDTH]
    apart = (runs[:, _R_RUNS] == 1) & ((src - dst) % 4 == 0) & (width > 8)
    head = np.where(apart, -src % 4, 0)
    tail = np.where(apart, (src + width) % 4, 0)
    if not (head.any() or tail.any()):
        return runs
    ends = width - tail
    parts = []
    for begin, end in ((np.zeros_like(head), head), (head, ends), (ends, width)):
        part = runs.copy()
        part[:, (_R_SRC, _R_DST, _R_AT)] += begin[:, None]
        part[:, _R_WIDTH] = end - begin
        parts.append(part[part[:, _R_WIDTH] > 0])
    return np.concatenate(parts)


def _units(runs: Numbers) -> Numbers:
    bits = np.bitwise_or.reduce(
        runs[:, (_R_SRC, _R_DST, _R_WIDTH, _R_SRC_STEP, _R_DST_STEP)], axis=1
    )
    return np.where(bits % 4 == 0, 4, np.where(bits % 2 == 0, 2, 1))


def _rows(runs: Numbers, unit: int, blocks: Blocks | None) -> Numbers:
    """Cut at the bounds of blocks, and then so that none is too long."""
    which = np.arange(len(runs))
    begins = np.zeros(len(runs), np.int64)
    ends = runs[:, _R_WIDTH] * runs[:, _R_RUNS]
    in_a_row = (runs[:, _R_RUNS] == 1) | (runs[:, _R_SRC_STEP] == runs[:, _R_WIDTH])
    if blocks is not None and len(blocks):
        which, begins, ends = _cut_at(runs[:, _R_AT], begins, ends, in_a_row, blocks.bounds)
    parts = -(-(ends - begins) // _ROW_NBYTES)
    again = np.repeat(np.arange(len(which)), parts)
    step = np.arange(len(again)) - np.repeat(np.cumsum(parts) - parts, parts)
    begins = begins[again] + step * _ROW_NBYTES
    ends = np.minimum(ends[again], begins + _ROW_NBYTES)
    which = which[again]
    some = runs[which]
    width = some[:, _R_WIDTH]
    run = np.where(some[:, _R_RUNS] > 1, begins // width, 0)
    along = begins - run * width
    single = some[:, _R_RUNS] == 1  # of which a row is a run as well
    rows = np.empty((len(which), COLUMNS), np.int64)
    rows[:, SRC] = some[:, _R_SRC] + run * some[:, _R_SRC_STEP] + np.where(single, along, 0)
    rows[:, DST] = some[:, _R_DST] + run * some[:, _R_DST_STEP] + np.where(single, along, 0)
    rows[:, WIDTH] = np.where(single, ends - begins, width) // unit
    rows[:, SRC_STEP] = some[:, _R_SRC_STEP] // unit
    rows[:, DST_STEP] = some[:, _R_DST_STEP] // unit
    rows[:, FIRST] = np.where(single, 0, along) // unit
    rows[:, COUNT] = (ends - begins) // unit
    rows[:, SLOT] = -1
    rows[:, AHEAD] = 0
    if blocks is not None and len(blocks):
        slots, ahead = blocks.slots_of(some[:, _R_AT] + begins)
        rows[:, SLOT] = np.where(in_a_row[which], slots, -1)
        rows[:, AHEAD] = ahead // 4
    return rows


def _cut_at(
    at: Numbers, begins: Numbers, ends: Numbers, may: npt.NDArray[np.bool_], bounds: Numbers
) -> tuple[Numbers, Numbers, Numbers]:
    """Of what lies in a row at the source: the parts between bounds. Returns whose they are, and
    from where to where.
    """
    low = np.searchsorted(bounds, at + begins, "right")
    high = np.where(may, np.searchsorted(bounds, at + ends, "left"), low)
    parts = high - low + 1
    which = np.repeat(np.arange(len(at)), parts)
    step = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    inner = low[which] + step
    begin = np.where(step == 0, begins[which], bounds[inner - 1] - at[which])
    end = np.where(
        step == parts[which] - 1,
        ends[which],
        bounds[np.minimum(inner, len(bounds) - 1)] - at[which],
    )
    return which, begin, end
