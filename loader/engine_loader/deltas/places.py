"""Where the elements of a source's tensor lie in ours, which may hold other boxes. Pure.

An element has as its place its index in memory. Both tensors may have any order of their
dimensions. Our tensor may hold an element of the source's more than once, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from engine_loader.planning.boxes import Box
from engine_loader.planning.placed import Placed, placed, steps_of
from engine_registry.schema.manifest import TensorEntry

Moved = tuple[torch.Tensor, torch.Tensor]


def same_places(src: TensorEntry, dst: TensorEntry) -> bool:
    """All elements lie at the same places in both."""
    return (src.shape, src.strides, src.along) == (dst.shape, dst.strides, dst.along)


def ways(src: TensorEntry, dst: TensorEntry, parts: int, device: torch.device) -> list[Way]:
    """Into each box of our tensor that the source's has elements of. One is of `parts` integers."""
    found = (_way(src, box, ahead, parts, device) for box, ahead in placed(dst))
    return [way for way in found if way is not None]


@dataclass(frozen=True)
class Way:
    """Into one box of ours. The sizes are those of the source's dimensions, the longest steps
    first. The table of a dimension says for each coordinate how far it leads in our memory, or -1
    outside of the box. No element before `start` or from `stop` on is in the box.
    """

    sizes: tuple[int, ...]
    tables: tuple[torch.Tensor, ...]
    ahead: int
    start: int
    stop: int

    def of(self, places: torch.Tensor, values: torch.Tensor) -> Iterator[Moved]:
        """Our places of the values that are in the box, and these."""
        rest = places
        ours = torch.full_like(places, self.ahead)
        kept = torch.ones_like(places, dtype=torch.bool)
        for number in reversed(range(len(self.sizes))):
            outer = rest // self.sizes[number] if number else torch.zeros_like(rest)
            far = self.tables[number][rest - outer * self.sizes[number]]
            ours += far
            kept &= far >= 0
            rest = outer
        at = kept.nonzero().squeeze(1)
        yield ours[at], values[at]

    def of_run(self, first: int, values: torch.Tensor) -> Iterator[Moved]:
        """The same of values that lie in a row from `first` on."""
        for place, box in _boxes_of_run(
            self.sizes, max(first, self.start), min(first + values.numel(), self.stop)
        ):
            part = values[place - first : place - first + box.volume].reshape(box.shape)
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
    src: TensorEntry, placed_box: Placed, ahead: int, parts: int, device: torch.device
) -> Way | None:
    """None where the source has nothing of the box."""
    box, steps = placed_box
    src_steps = steps_of(src)
    tables: list[tuple[int, npt.NDArray[np.int64]]] = []  # each with the step at the source
    for slices, start, size, step, src_step in zip(
        src.along, box.offsets, box.shape, steps, src_steps, strict=True
    ):
        whole = np.concatenate([np.arange(*some) for some in slices])
        inside = (whole >= start) & (whole < start + size)
        if not inside.any():
            return None
        if len(whole) == 1:
            ahead += int(whole[0] - start) * step
        else:
            tables.append((src_step, np.where(inside, (whole - start) * (step * parts), -1)))
    tables.sort(key=lambda pair: -pair[0])
    if parts > 1:
        tables.append((0, np.arange(parts)))
    chosen = [table for _, table in tables]
    start, stop = 0, 1
    if chosen:
        rows = (chosen[0] >= 0).nonzero()[0]
        row = prod(map(len, chosen[1:]))
        start, stop = int(rows[0]) * row, (int(rows[-1]) + 1) * row
    return Way(
        tuple(map(len, chosen)),
        tuple(torch.from_numpy(table).to(device) for table in chosen),
        ahead * parts,
        start,
        stop,
    )


def _boxes_of_run(sizes: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """The elements from `start` to `stop` of a tensor that lies row by row, in boxes: each with the
    place of its first element.
    """
    if start >= stop:
        return
    if not sizes:
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
    ahead = number * prod(sizes[1:])
    for first, box in _boxes_of_run(sizes[1:], start - ahead, stop - ahead):
        yield first + ahead, Box((number, *box.offsets), (1, *box.shape))
