"""Finds where the elements of many blocks of a delta belong, and writes them there, on a GPU, by
Triton. Called by `deltas.apply_on_gpu`.

A program takes a part of the elements that a block lists. `measure` adds up the gaps of each part,
and writes nothing to tensors; `place` does, once the host has found that all gaps are good. Where
Triton or the compiler that it needs is missing, `deltas.apply` does without.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine_loader.deltas.format import BYTES, DENSE
from engine_loader.deltas.on_gpu import Numbers, tiles_of

_PART = 1024  # elements; the sum of their gaps fits into 32 bits
_PARTS = 512  # of a block, that are added up at a time
_INTEGERS = (tl.int8, tl.int16, tl.int32, tl.int64)
_ELEMENTS = {each.primitive_bitwidth // 8: tl.constexpr(each) for each in _INTEGERS}
_BYTES, _DENSE = tl.constexpr(BYTES), tl.constexpr(DENSE)


class Measured(NamedTuple):
    """On the device, of some blocks: what `place` needs, and `ends`, int64, a row for each block:
    the sum of its gaps, and how many of them are 0 behind the first one.
    """

    table: torch.Tensor
    whose: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor


@triton.jit
def _gaps(row, number, inside):  # type: ignore[no-untyped-def]
    """Those of a block with these numbers."""
    addr = tl.load(row)
    if tl.load(row + 2) == _BYTES:
        octets = addr.to(tl.pointer_type(tl.uint8))
        some = tl.load(octets + number, mask=inside, other=0).to(tl.int32)
    else:
        shorts = addr.to(tl.pointer_type(tl.uint16))
        some = tl.load(shorts + number, mask=inside, other=0).to(tl.int32)
    return some


@triton.jit  # type: ignore[untyped-decorator]
def _measure(blocks, whose, sums, COLUMNS: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each part: the sum of its gaps, and how many are 0."""
    part = tl.program_id(0)
    row = blocks + tl.load(whose + part).to(tl.int64) * COLUMNS
    number = (part - tl.load(row + 3)).to(tl.int32) * PART + tl.arange(0, PART)
    total = 0
    zeros = 0
    if tl.load(row + 2) != _DENSE:
        inside = number < tl.load(row + 1)
        gaps = _gaps(row, number, inside)
        total += tl.sum(gaps, 0)
        zeros += tl.sum((inside & (number > 0) & (gaps == 0)).to(tl.int32), 0)
    tl.store(sums + part * 2, total)
    tl.store(sums + part * 2 + 1, zeros)


@triton.jit  # type: ignore[untyped-decorator]
def _add_up(  # type: ignore[no-untyped-def]
    blocks,
    sums,
    starts,
    ends,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Of each block: its ends. Of each part in it: the sum of the gaps before it."""
    block = tl.program_id(0)
    row = blocks + block.to(tl.int64) * COLUMNS
    count = tl.cdiv(tl.load(row + 1), PART).to(tl.int32)
    sums += tl.load(row + 3) * 2
    starts += tl.load(row + 3)
    total = tl.zeros((), tl.int64)
    zeros = 0
    for first in range(0, count, PARTS):
        part = first + tl.arange(0, PARTS)
        some = tl.load(sums + part * 2, mask=part < count, other=0).to(tl.int64)
        tl.store(starts + part, total + tl.cumsum(some, 0) - some, mask=part < count)
        total += tl.sum(some, 0)
        zeros += tl.sum(tl.load(sums + part * 2 + 1, mask=part < count, other=0), 0)
    tl.store(ends + 2 * block, total)
    tl.store(ends + 2 * block + 1, zeros)


@triton.jit  # type: ignore[untyped-decorator]
def _place(  # type: ignore[no-untyped-def]
    blocks,
    whose,
    starts,
    COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    PART: tl.constexpr,
):
    """The places of a part's elements in the block, in the source's tensor, and in ours. The last
    are as `places.Way` says, of which the row has the sizes and tables, the innermost first.
    """
    part = tl.program_id(0)
    row = blocks + tl.load(whose + part).to(tl.int64) * COLUMNS
    number = (part - tl.load(row + 3)).to(tl.int32) * PART + tl.arange(0, PART)
    wanted = number < tl.load(row + 1)
    place = number.to(tl.int64)
    if tl.load(row + 2) != _DENSE:
        place = tl.load(starts + part) + tl.cumsum(_gaps(row, number, wanted), 0)
    values = tl.load(row + 4).to(tl.pointer_type(ELEMENT))
    value = tl.load(values + number, mask=wanted, other=0)
    wanted &= place < tl.load(row + 5)  # of which the host has made sure
    rest = tl.load(row + 6) + place
    ours = tl.load(row + 8) + tl.zeros_like(rest)
    for dimension in tl.static_range(DIMENSIONS):
        size = tl.load(row + 9 + 2 * dimension)
        table = tl.load(row + 10 + 2 * dimension).to(tl.pointer_type(tl.int64))
        outer = rest // size
        far = tl.load(table + (rest - outer * size), mask=wanted, other=-1)
        wanted &= far >= 0
        ours += far
        rest = outer
    into = tl.load(row + 7).to(tl.pointer_type(ELEMENT))
    tl.store(into + ours + rest, value, mask=wanted)


def measure(blocks: Numbers, device: torch.device) -> Measured:
    """Begins to find out where the elements belong that these blocks list.

    Args:
        blocks: a row for each: the address of its gaps, how many elements it lists, and its kind,
            which is not SAME.
        device: the one that has the delta.
    """
    table, whose = tiles_of(blocks, blocks[:, 1], _PART, device)
    columns = table.shape[1]
    sums = torch.empty((len(whose), 2), dtype=torch.int32, device=device)
    starts = torch.empty(len(whose), dtype=torch.int64, device=device)
    ends = torch.empty((len(blocks), 2), dtype=torch.int64, device=device)
    _measure[(len(whose),)](table, whose, sums, COLUMNS=columns, PART=_PART)
    _add_up[(len(blocks),)](table, sums, starts, ends, COLUMNS=columns, PART=_PART, PARTS=_PARTS)
    return Measured(table, whose, starts, ends)


def place(measured: Measured, more: Numbers, itemsize: int) -> None:
    """Begins to write the elements of blocks, whose gaps are good.

    Args:
        measured: what `measure` returned.
        more: a row for each block: the address of its values; how many elements it is of; the place
            of the first of them in the source's tensor; the address of ours; the place there from
            which on the tables lead; and for each dimension, the innermost first, its size and the
            address of its table, int64, of places, -1 for those that we do not have. Without
            dimensions all places are as in the source's tensor.
        itemsize: of all elements: 1, 2, 4 or 8 bytes.
    """
    rest = torch.from_numpy(more).to(measured.table.device)
    table = torch.cat([measured.table, rest], dim=1)
    _place[(len(measured.whose),)](
        table,
        measured.whose,
        measured.starts,
        COLUMNS=table.shape[1],
        ELEMENT=_ELEMENTS[itemsize],
        DIMENSIONS=(more.shape[1] - 5) // 2,
        PART=_PART,
    )
