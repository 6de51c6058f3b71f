"""Boxes of a tensor, and runs of bytes at equal distances, as a box has in memory. Pure.

A rank holds a box of the whole tensor, which begins at `offsets` and has `shape`, or several.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Box(NamedTuple):
    """`offsets` and `shape` are of one length.

    A box of a tensor without dimensions holds its one element.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        return prod(self.shape)

    def meet(self, other: Box) -> Box | None:
        """What both hold; None if that is nothing."""
        starts, shape = [], []
        for start, size, other_start, other_size in zip(
            self.offsets, self.shape, other.offsets, other.shape, strict=True
        ):
            # as `max` and `min`, which take most of a plan's time
            first = start if start > other_start else other_start
            end, other_end = start + size, other_start + other_size
            common = (end if end < other_end else other_end) - first
            if common <= 0:
                return None
            starts.append(first)
            shape.append(common)
        return Box(tuple(starts), tuple(shape))

    def minus(self, other: Box) -> list[Box]:
        """What only this one holds, in boxes that do not overlap."""
        common = self.meet(other)
        if common is None:
            return [self] if self.volume else []
        rest = []
        offsets, shape = list(self.offsets), list(self.shape)
        for axis, (start, size) in enumerate(zip(common.offsets, common.shape, strict=True)):
            before, after = start - offsets[axis], offsets[axis] + shape[axis] - (start + size)
            for part_start, part_size in ((offsets[axis], before), (start + size, after)):
                if part_size:
                    rest.append(
                        Box(
                            (*offsets[:axis], part_start, *offsets[axis + 1 :]),
                            (*shape[:axis], part_size, *shape[axis + 1 :]),
                        )
                    )
            offsets[axis], shape[axis] = start, size
        return rest

    def holds(self, other: Box) -> bool:
        return self.meet(other) == other


def check_partition(whole: Box, parts: Iterable[Box]) -> None:
    """ValueError unless the parts hold every element of the whole once, and no other."""
    some = list(parts)
    if any(not whole.holds(part) for part in some):
        raise ValueError("a part lies outside the box")
    if _overlap(some):
        raise ValueError("two parts hold the same element")
    if sum(part.volume for part in some) != whole.volume:
        raise ValueError("the parts do not hold all of the box")


def _overlap(parts: list[Box]) -> bool:
    """Goes along the axis on which they begin at the most places, so that few have to be compared
    with each other.
    """
    if len(parts) < 2 or not parts[0].shape:
        return len(parts) > 1
    axis = _most_varied_axis(parts)
    reaching: list[Box] = []
    for part in sorted(parts, key=lambda part: part.offsets[axis]):
        reaching = [
            other
            for other in reaching
            if other.offsets[axis] + other.shape[axis] > part.offsets[axis]
        ]
        if any(other.meet(part) is not None for other in reaching):
            return True
        reaching.append(part)
    return False


def _most_varied_axis(boxes: Sequence[Box]) -> int:
    return max(
        range(len(boxes[0].shape)), key=lambda axis: len({box.offsets[axis] for box in boxes})
    )


class Nearby(Generic[T]):
    """Boxes that are found by where they lie, each with something that it stands for."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        """`boxes` are those that may be added."""
        self._axis = _most_varied_axis(boxes) if boxes and boxes[0].shape else None
        axis = self._axis
        self._longest = max([box.shape[axis] for box in boxes]) if axis is not None else 0
        self._starts: list[int] = []  # sorted
        self._held: list[tuple[Box, T]] = []

    def add(self, box: Box, value: T) -> None:
        start = box.offsets[self._axis] if self._axis is not None else 0
        place = bisect.bisect_right(self._starts, start)
        self._starts.insert(place, start)
        self._held.insert(place, (box, value))

    def of(self, box: Box) -> list[tuple[Box, T]]:
        """All that meet the box, and others."""
        if self._axis is None:
            return self._held
        start, size = box.offsets[self._axis], box.shape[self._axis]
        first = bisect.bisect_right(self._starts, start - self._longest)
        return self._held[first : bisect.bisect_left(self._starts, start + size)]


class Lines(NamedTuple):
    """Runs of `nbytes` bytes at equal distances: `counts` of them along each axis, `src_steps`
    apart on one side and `dst_steps` on the other, the first at `src` and `dst`. Without axes it is
    one run. Axes come with the longest steps first, and what is within one step of an axis does not
    reach into the next.
    """

    src: int
    dst: int
    nbytes: int
    counts: tuple[int, ...] = ()
    src_steps: tuple[int, ...] = ()
    dst_steps: tuple[int, ...] = ()

    @property
    def payload(self) -> int:
        return self.nbytes * prod(self.counts)

    @property
    def extent(self) -> int:
        """From the first to the last byte on the source's side, with what lies between."""
        return self.nbytes + sum(
            [(count - 1) * step for count, step in zip(self.counts, self.src_steps, strict=True)]
        )

    @property
    def dst_extent(self) -> int:
        """From the first to the last byte on our side, with what lies between."""
        return self.nbytes + sum(
            [(count - 1) * step for count, step in zip(self.counts, self.dst_steps, strict=True)]
        )

    def at(self, src: int, dst: int) -> Lines:
        """The same further on."""
        return Lines(
            self.src + src, self.dst + dst, self.nbytes, self.counts, self.src_steps, self.dst_steps
        )

    def along(self, axes: int) -> Iterator[Lines]:
        """Each on its own along that many of the first axes."""
        if not axes:
            yield self
            return
        rest = Lines(
            self.src,
            self.dst,
            self.nbytes,
            self.counts[axes:],
            self.src_steps[axes:],
            self.dst_steps[axes:],
        )
        for place in itertools.product(*map(range, self.counts[:axes])):
            src = sum([index * step for index, step in zip(place, self.src_steps, strict=False)])
            dst = sum([index * step for index, step in zip(place, self.dst_steps, strict=False)])
            yield rest.at(src, dst)

    def pieces(self, max_nbytes: int) -> Iterator[Lines]:
        """In order, parts of up to so many bytes, or of one run."""
        if not self.counts or self.payload <= max_nbytes:
            yield self
            return
        at_once = max_nbytes // (self.payload // self.counts[0])
        if at_once:
            yield from self.split(at_once)
        else:
            for some in self.along(1):
                yield from some.pieces(max_nbytes)

    def split(self, at_once: int) -> Iterator[Lines]:
        """In order, parts with up to `at_once` along the first axis; what is left on its own there
        comes without the axis.
        """
        if not self.counts or at_once >= self.counts[0]:
            yield self
            return
        for start in range(0, self.counts[0], at_once):
            counts = (min(at_once, self.counts[0] - start), *self.counts[1:])
            part = self._replace(counts=counts).at(
                start * self.src_steps[0], start * self.dst_steps[0]
            )
            yield from (part.along(1) if counts[0] == 1 else [part])
