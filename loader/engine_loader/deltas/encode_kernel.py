"""Finds what has changed in many blocks on a GPU, and writes it, by Triton. Called by
`deltas.encode_on_gpu`.

A program takes a tile of a block. `look` counts what a tile has changed, adds up the tiles of each
block, and says where in the block's contents each tile writes; `write` then does. Where Triton or
the compiler that it needs is missing, `deltas.blocks` does without.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from engine_loader.deltas.format import BYTES, DENSE, GAPS, SHORTS
from engine_loader.deltas.on_gpu import Numbers, tiles_of

_TILE = 4096  # elements: fewer than the longest gap of `shorts`, which needs no bridge in a tile
_STEP = 512  # of which a program takes so many at a time: more do not fit into its registers
_TILES = 512  # of a block, that are added up at a time
_ELEMENTS = {
    1: tl.constexpr(tl.int8),
    2: tl.constexpr(tl.int16),
    4: tl.constexpr(tl.int32),
    8: tl.constexpr(tl.int64),
}
_BYTES, _DENSE = tl.constexpr(BYTES), tl.constexpr(DENSE)
_BYTE = tl.constexpr(int(np.iinfo(GAPS[BYTES]).max))
_SHORT = tl.constexpr(int(np.iinfo(GAPS[SHORTS]).max))


class Looked(NamedTuple):
    """On the device, of some blocks: what `write` needs, and `sums`, int32, a row for each block:
    how many elements differ, and how many it lists with gaps of u8, and with gaps of u16.
    """

    table: torch.Tensor
    whose: torch.Tensor
    found: torch.Tensor
    places: torch.Tensor
    sums: torch.Tensor


@triton.jit
def _later(one, other):  # type: ignore[no-untyped-def]
    return tl.maximum(one, other)


@triton.jit  # type: ignore[untyped-decorator]
def _elements(addr, start, count, ELEMENT: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Those of a step that begins at `start`, of which `count` are left; zeros behind them."""
    place = tl.arange(0, STEP)
    first = addr.to(tl.pointer_type(ELEMENT)) + start
    if (count >= STEP) & (addr % 16 == 0):  # they can be read 16 bytes at a time
        some = tl.load(tl.multiple_of(first, 16) + place)
    else:
        some = tl.load(first + place, mask=place < count, other=0)
    return some


@triton.jit  # type: ignore[untyped-decorator]
def _earlier(old, new, start, count, ELEMENT: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """For each place of a step the last one before it, of the step, that has changed, or -1."""
    place = tl.arange(0, STEP) - 1
    inside = (place >= 0) & (place < count)
    was = tl.load(old.to(tl.pointer_type(ELEMENT)) + start + place, mask=inside, other=0)
    became = tl.load(new.to(tl.pointer_type(ELEMENT)) + start + place, mask=inside, other=0)
    return tl.associative_scan(tl.where(was != became, place, -1), 0, _later)


@triton.jit  # type: ignore[untyped-decorator]
def _look(  # type: ignore[no-untyped-def]
    blocks,
    whose,
    found,
    COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Of each tile: how many elements differ, the places of the first and the last of them in the
    block, and how many bridges the gaps of u8 between these two need.
    """
    tile = tl.program_id(0)
    row = blocks + tl.load(whose + tile).to(tl.int64) * COLUMNS
    old = tl.load(row)
    new = tl.load(row + 1)
    begin = (tile - tl.load(row + 3)).to(tl.int32) * TILE
    end = tl.minimum(begin + TILE, tl.load(row + 2).to(tl.int32))
    number = 0
    first = end
    last = -1
    bridges = 0
    for start in range(begin, end, STEP):
        count = end - start
        was = _elements(old, start, count, ELEMENT, STEP)
        changed = was != _elements(new, start, count, ELEMENT, STEP)
        some = tl.sum(changed.to(tl.int32), 0)
        if some > 0:
            place = tl.arange(0, STEP)
            earlier = _earlier(old, new, start, count, ELEMENT, STEP)
            known = (earlier >= 0) | (last >= 0)
            gap = place - tl.where(earlier >= 0, earlier, last - start)
            bridges += tl.sum(tl.where(changed & known, (gap - 1) // _BYTE, 0), 0)
            first = tl.minimum(first, start + tl.min(tl.where(changed, place, STEP), 0))
            last = start + tl.max(tl.where(changed, place, -1), 0)
            number += some
    found += tile * 4
    tl.store(found, number)
    tl.store(found + 1, first)
    tl.store(found + 2, last)
    tl.store(found + 3, bridges)


@triton.jit  # type: ignore[untyped-decorator]
def _add_up(  # type: ignore[no-untyped-def]
    blocks, found, places, sums, COLUMNS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr
):
    """Of each block: its sums. Of each tile in it: the place of the element that differs before it,
    or 0; and how many elements the tiles before it list, with gaps of u8 and of u16.
    """
    block = tl.program_id(0)
    row = blocks + block.to(tl.int64) * COLUMNS
    count = tl.cdiv(tl.load(row + 2), TILE).to(tl.int32)
    found += tl.load(row + 3) * 4
    places += tl.load(row + 3) * 3
    last = -1
    differ = 0
    as_bytes = 0
    as_shorts = 0
    for start in range(0, count, TILES):
        tile = start + tl.arange(0, TILES)
        inside = tile < count
        some = tl.load(found + tile * 4, mask=inside, other=0)
        begin = tl.load(found + tile * 4 + 1, mask=inside, other=0)
        end = tl.load(found + tile * 4 + 2, mask=inside, other=-1)
        bridges = tl.load(found + tile * 4 + 3, mask=inside, other=0)
        ends = tl.load(found + tile * 4 - 2, mask=inside & (tile > start), other=-1)
        before = tl.maximum(tl.maximum(tl.associative_scan(ends, 0, _later), last), 0)
        ahead = tl.maximum(begin - before - 1, 0)
        of_bytes = tl.where(some > 0, some + bridges + ahead // _BYTE, 0)
        of_shorts = tl.where(some > 0, some + ahead // _SHORT, 0)
        in_bytes = as_bytes + tl.cumsum(of_bytes, 0) - of_bytes
        in_shorts = as_shorts + tl.cumsum(of_shorts, 0) - of_shorts
        tl.store(places + tile * 3, before, mask=inside)
        tl.store(places + tile * 3 + 1, in_bytes, mask=inside)
        tl.store(places + tile * 3 + 2, in_shorts, mask=inside)
        last = tl.maximum(last, tl.max(end, 0))
        differ += tl.sum(some, 0)
        as_bytes += tl.sum(of_bytes, 0)
        as_shorts += tl.sum(of_shorts, 0)
    tl.store(sums + 3 * block, differ)
    tl.store(sums + 3 * block + 1, as_bytes)
    tl.store(sums + 3 * block + 2, as_shorts)


@triton.jit  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    blocks,
    whose,
    found,
    places,
    COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """What each tile has in the contents of its block; its first one what is around them, too."""
    tile = tl.program_id(0)
    row = blocks + tl.load(whose + tile).to(tl.int64) * COLUMNS
    old = tl.load(row)
    new = tl.load(row + 1)
    begin = (tile - tl.load(row + 3)).to(tl.int32) * TILE
    end = tl.minimum(begin + TILE, tl.load(row + 2).to(tl.int32))
    kind = tl.load(row + 4)
    gaps = tl.load(row + 5)
    values = tl.load(row + 6).to(tl.pointer_type(ELEMENT))
    if begin == 0:
        _write_frame(row)
    if kind == _DENSE:
        for start in range(begin, end, STEP):
            place = start + tl.arange(0, STEP)
            some = _elements(new, start, end - start, ELEMENT, STEP)
            tl.store(values + place, some, mask=place < end)
    elif tl.load(found + tile * 4) > 0:
        places += tile * 3
        if kind == _BYTES:
            octets = gaps.to(tl.pointer_type(tl.uint8))
            _list(old, new, begin, end, places, 1, octets, values, _BYTE, ELEMENT, STEP)
        else:
            shorts = gaps.to(tl.pointer_type(tl.uint16))
            _list(old, new, begin, end, places, 2, shorts, values, _SHORT, ELEMENT, STEP)


@triton.jit
def _write_frame(row):  # type: ignore[no-untyped-def]
    """The block in the section's table, if it has one, and zeros behind its gaps and values."""
    stated = tl.load(row + 9)
    tl.store(stated.to(tl.pointer_type(tl.int64)), tl.load(row + 10), mask=stated != 0)
    place = tl.arange(0, 8)
    for column in tl.static_range(7, 9):
        end = tl.load(row + column)
        behind = end.to(tl.pointer_type(tl.int8)) + place
        tl.store(behind, tl.zeros((8,), tl.int8), mask=place < (8 - end % 8) % 8)


@triton.jit  # type: ignore[untyped-decorator]
def _list(  # type: ignore[no-untyped-def]
    old,
    new,
    begin,
    end,
    places,
    column,
    gaps,
    values,
    MOST: tl.constexpr,
    ELEMENT: tl.constexpr,
    STEP: tl.constexpr,
):
    """The gaps and the values of a tile, behind those of the tiles before it."""
    before = tl.load(places)
    at = tl.load(places + column)
    for start in range(begin, end, STEP):
        count = end - start
        became = _elements(new, start, count, ELEMENT, STEP)
        changed = _elements(old, start, count, ELEMENT, STEP) != became
        if tl.sum(changed.to(tl.int32), 0) > 0:
            place = tl.arange(0, STEP)
            earlier = _earlier(old, new, start, count, ELEMENT, STEP)
            gap = place - tl.where(earlier >= 0, earlier, before - start)
            bridges = tl.where(changed, tl.maximum(gap - 1, 0) // MOST, 0)
            listed = tl.where(changed, bridges + 1, 0)
            number = at + tl.cumsum(listed, 0) - 1
            tl.store(gaps + number, gap - bridges * MOST, mask=changed)
            tl.store(values + number, became, mask=changed)
            if tl.max(bridges, 0) > 0:
                ours = new.to(tl.pointer_type(ELEMENT)) + start
                inner = tl.where(earlier >= 0, bridges, 0)
                for nth in range(tl.max(inner, 0)):
                    wanted = nth < inner
                    value = tl.load(ours + earlier + (nth + 1) * MOST, mask=wanted, other=0)
                    tl.store(gaps + number - inner + nth, MOST, mask=wanted)
                    tl.store(values + number - inner + nth, value, mask=wanted)
                outer = tl.max(bridges - inner, 0)  # before the first that has changed here
                ours += before - start
                for ahead in range(0, outer, STEP):
                    bridge = ahead + place
                    value = tl.load(ours + (bridge + 1) * MOST, mask=bridge < outer, other=0)
                    tl.store(gaps + at + bridge, MOST, mask=bridge < outer)
                    tl.store(values + at + bridge, value, mask=bridge < outer)
            at += tl.sum(listed, 0)
            before = start + tl.max(tl.where(changed, place, -1), 0)


def look(blocks: Numbers, itemsize: int, device: torch.device) -> Looked:
    """Begins to find out what has changed in these blocks.

    Args:
        blocks: a row for each: the addresses before and after, and how many elements it has.
        itemsize: of all elements: 1, 2, 4 or 8 bytes.
        device: the one that has both versions.
    """
    table, whose = tiles_of(blocks, blocks[:, 2], _TILE, device)
    tiles, columns = len(whose), table.shape[1]
    found = torch.empty((tiles, 4), dtype=torch.int32, device=device)
    places = torch.empty((tiles, 3), dtype=torch.int32, device=device)
    sums = torch.empty((len(blocks), 3), dtype=torch.int32, device=device)
    element = _ELEMENTS[itemsize]
    _look[(tiles,)](table, whose, found, COLUMNS=columns, ELEMENT=element, TILE=_TILE, STEP=_STEP)
    _add_up[(len(blocks),)](table, found, places, sums, COLUMNS=columns, TILE=_TILE, TILES=_TILES)
    return Looked(table, whose, found, places, sums)


def write(looked: Looked, contents: Numbers, itemsize: int) -> None:
    """Begins to write the blocks that were looked at.

    Args:
        looked: what `look` returned.
        contents: a row for each block: its kind; the addresses where its gaps and its values begin,
            and those where they end; the address of what the table says of it, or 0; and this, 8
            bytes. Nothing of a block that is the same is written but the latter.
        itemsize: as for `look`.
    """
    rest = torch.from_numpy(contents).to(looked.table.device)
    table = torch.cat([looked.table, rest], dim=1)
    _write[(len(looked.whose),)](
        table,
        looked.whose,
        looked.found,
        looked.places,
        COLUMNS=table.shape[1],
        ELEMENT=_ELEMENTS[itemsize],
        TILE=_TILE,
        STEP=_STEP,
    )
