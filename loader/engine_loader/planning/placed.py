"""The boxes of the whole that a tensor holds, and how the bytes of a box lie in the memory of two
tensors that both hold it. Pure.

A tensor that is fused of several, such as the queries, keys and values of an attention, holds
several boxes: for each dimension the slices of the whole that lie there one after another.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from engine_loader.planning.boxes import Box, Lines
from engine_registry.schema.manifest import TensorEntry, dense_strides


class Placed(NamedTuple):
    """A box in memory: along each dimension neighbours lie so many elements apart. `steps` are 0
    along dimensions in which the box has one element or none, so that equal places are equal.
    """

    box: Box
    steps: tuple[int, ...]


def boxes_of(entry: TensorEntry) -> list[Box]:
    """In the order in which they lie in the tensor, row by row."""
    if entry.slices is None:
        return [Box(entry.offsets, entry.shape)]
    return [
        Box(
            tuple([start for start, _ in some]),
            tuple([stop - start for start, stop in some]),
        )
        for some in itertools.product(*entry.slices)
    ]


def placed(entry: TensorEntry) -> list[tuple[Placed, int]]:
    """Its boxes, each with the number of elements that lie in memory before its first one."""
    steps, boxes = steps_of(entry), boxes_of(entry)
    ahead = [_begins(some, step) for some, step in zip(entry.along, steps, strict=True)]
    return [
        (Placed(box, _normal(steps, box.shape)), sum(place))
        for box, place in zip(boxes, itertools.product(*ahead), strict=True)
    ]


def _normal(steps: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    return tuple([step if size > 1 else 0 for step, size in zip(steps, shape, strict=True)])


def _begins(slices: Sequence[tuple[int, int]], step: int) -> list[int]:
    """In elements of memory, from the beginning of the tensor."""
    sizes = [stop - start for start, stop in slices]
    return [step * before for before in itertools.accumulate(sizes[:-1], initial=0)]


def steps_of(entry: TensorEntry) -> tuple[int, ...]:
    """How many elements lie between neighbours along each dimension."""
    if entry.strides is not None:
        return entry.strides
    return tuple([prod(entry.shape[axis + 1 :]) for axis in range(len(entry.shape))])


def strides_like(entry: TensorEntry, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Of a tensor of that shape whose dimensions lie in memory in the order in which those of the
    entry do; None: row by row.
    """
    if entry.strides is None or 0 in shape:
        return None
    strides, nelements = [1] * len(shape), 1
    for axis in sorted(range(len(shape)), key=entry.strides.__getitem__):
        strides[axis] = nelements
        nelements *= shape[axis]
    return dense_strides(shape, strides)


def in_one_order(one: TensorEntry, other: TensorEntry) -> bool:
    """Both lie row by row, or both in the same other order of the dimensions along which each has
    several elements. The shapes are of one length.
    """
    if one.strides is other.strides is None or not (one.nbytes and other.nbytes):
        return True
    several = [
        steps
        for size, other_size, *steps in zip(
            one.shape, other.shape, steps_of(one), steps_of(other), strict=True
        )
        if size > 1 and other_size > 1
    ]
    return [step for _, step in sorted(several)] == sorted([step for _, step in several])


def lines(part: Box, src: Placed, dst: Placed, itemsize: int) -> Lines:
    """Where the bytes of `part`, which both hold, lie in either's memory, from the first of the box
    there.

    ValueError where the dimensions do not lie in the same order on both sides.
    """
    src_at = dst_at = 0
    inner_first: list[tuple[int, int, int]] = []
    for size, start, src_start, dst_start, src_step, dst_step in zip(
        part.shape,
        part.offsets,
        src.box.offsets,
        dst.box.offsets,
        src.steps,
        dst.steps,
        strict=True,
    ):
        src_at += (start - src_start) * src_step
        dst_at += (start - dst_start) * dst_step
        if size > 1:
            inner_first.append((dst_step * itemsize, src_step * itemsize, size))
    inner_first.sort()
    nbytes = reached = itemsize
    axes: list[tuple[int, int, int]] = []
    for dst_step, src_step, size in inner_first:
        if src_step < reached:
            raise ValueError("the dimensions lie in another order at the source")
        reached = src_step
        if not axes and nbytes == src_step == dst_step:  # all within is whole on both sides
            nbytes *= size
        elif axes and (axes[-1][0] * axes[-1][1], axes[-1][0] * axes[-1][2]) == (
            src_step,
            dst_step,
        ):
            inner = axes.pop()
            axes.append((inner[0] * size, inner[1], inner[2]))
        else:
            axes.append((size, src_step, dst_step))
    axes.reverse()
    counts, src_steps, dst_steps = (tuple([axis[side] for axis in axes]) for side in range(3))
    return Lines(src_at * itemsize, dst_at * itemsize, nbytes, counts, src_steps, dst_steps)
