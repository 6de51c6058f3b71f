"""Where the elements of a source's tensor lie in ours, which may hold other boxes. Pure.

An element has as its place its index in memory. Both tensors may have any order of their
dimensions. Our tensor may hold an element of the source's more than once, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from engine_loader.planning.boxes import Box
from engine_loader.planning.placed import Placed, placed, steps_of
from engine_registry.schema.manifest import TensorEntry

Moved = tuple[torch.Tensor, torch.Tensor]


def same_places(src: TensorEntry, dst: TensorEntry) -> bool:
    """All elements lie at the same places in both."""
    return (src.shape, src.strides, src.along) == (dst.shape, dst.strides, dst.along)


class Ways:
    """From a source's tensor into all boxes of ours that meet it. An element is of `parts`
    integers.
    """

    def __init__(
        self, src: TensorEntry, dst: TensorEntry, parts: int, device: torch.device
    ) -> None:
        steps = steps_of(src)
        order = sorted(
            (axis for axis, size in enumerate(src.shape) if size > 1), key=lambda axis: -steps[axis]
        )
        self._ways = [
            way
            for box, ahead in placed(dst)
            if (way := _way(src, order, box, ahead, parts, device)) is not None
        ]

    def of(self, places: torch.Tensor, values: torch.Tensor) -> Iterator[Moved]:
        """Our places of the values that we hold, and these; some for each box."""
        for way in self._ways:
            yield way.of(places, values)

    def of_run(self, start: int, values: torch.Tensor) -> Iterator[Moved]:
        """The same of values that lie in a row from `start` on."""
        for way in self._ways:
            yield from way.of_run(start, values)


@dataclass(frozen=True)
class _Way:
    """Into one box. The sizes are those of the source's dimensions, the longest steps first. The
    table of a dimension says for each coordinate how far it leads in our memory, or -1 outside of
    the box.
    """

    sizes: tuple[int, ...]
    tables: tuple[torch.Tensor, ...]
    ahead: int

    def of(self, places: torch.Tensor, values: torch.Tensor) -> Moved:
        rest = places
        ours = torch.full_like(places, self.ahead)
        kept = torch.ones_like(places, dtype=torch.bool)
        for number in reversed(range(len(self.sizes))):
            outer = rest // self.sizes[number] if number else torch.zeros_like(rest)
            far = self.tables[number][rest - outer * self.sizes[number]]
            ours += far
            kept &= far >= 0
            rest = outer
        return ours[kept], values[kept]

    def of_run(self, start: int, values: torch.Tensor) -> Iterator[Moved]:
        for first, box in _boxes_of_run(self.sizes, start, start + values.numel()):
            part = values[first - start : first - start + box.volume].reshape(box.shape)
            ours = torch.full((), self.ahead, dtype=torch.int64, device=values.device)
            for axis, (table, offset, size) in enumerate(
                zip(self.tables, box.offsets, box.shape, strict=True)
            ):
                far = table[offset : offset + size]
                kept = (far >= 0).nonzero().squeeze(1)
                if len(kept) < size:
                    part = part.index_select(axis, kept)
                ours = ours.unsqueeze(-1) + far[kept]
            yield ours.reshape(-1), part.reshape(-1)


def _way(
    src: TensorEntry,
    order: list[int],
    placed_box: Placed,
    ahead: int,
    parts: int,
    device: torch.device,
) -> _Way | None:
    """None where the source has nothing of the box."""
    box, steps = placed_box
    tables = []
    for slices, start, size, step in zip(src.along, box.offsets, box.shape, steps, strict=True):
        whole = np.concatenate([np.arange(*some) for some in slices])
        inside = (whole >= start) & (whole < start + size)
        if not inside.any():
            return None
        tables.append(np.where(inside, (whole - start) * (step * parts), -1))
    chosen = [tables[axis] for axis in order]
    # a dimension of size 1 has one coordinate, which is inside
    sizes = [src.shape[axis] for axis in order]
    if parts > 1:
        chosen, sizes = [*chosen, np.arange(parts)], [*sizes, parts]
    return _Way(
        tuple(sizes),
        tuple(torch.from_numpy(table.astype(np.int64)).to(device) for table in chosen),
        ahead * parts,
    )


def _boxes_of_run(sizes: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """The elements from `start` to `stop` of a tensor that lies row by row, in boxes: each with the
    place of its first element.
    """
    if not sizes:
        if start < stop:
            yield start, Box((), ())
        return
    row = prod(sizes[1:])
    first, last = -(-start // row), stop // row  # rows that are whole
    if first > last:  # all in one row
        yield from _in_row(sizes, first - 1, start, stop)
        return
    yield from _in_row(sizes, first - 1, start, first * row)
    if first < last:
        yield first * row, Box((first,) + (0,) * (len(sizes) - 1), (last - first, *sizes[1:]))
    yield from _in_row(sizes, last, last * row, stop)


def _in_row(
    sizes: tuple[int, ...], number: int, start: int, stop: int
) -> Iterator[tuple[int, Box]]:
    if start >= stop:
        return
    ahead = number * prod(sizes[1:])
    for first, box in _boxes_of_run(sizes[1:], start - ahead, stop - ahead):
        yield first + ahead, Box((number, *box.offsets), (1, *box.shape))
