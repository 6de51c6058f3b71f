"""Finds what has changed in many blocks on a GPU, and writes it, by Triton. Called by
`deltas.encode_on_gpu`.

A program takes a tile of a block. `look` lists the places in a tile that have changed, adds up the
tiles of each block, and says where in the block's contents each tile writes; `write` then does.
Where Triton or the compiler that it needs is missing, `deltas.blocks` does without.
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
_STEP = 512  # elements of a tile, that are compared at a time
_SOME = 128  # places of a tile, that are seen to at a time, by one warp
_TILES = 512  # of a block, that are added up at a time
_INTEGERS = (tl.int8, tl.int16, tl.int32, tl.int64)
_ELEMENTS = {each.primitive_bitwidth // 8: tl.constexpr(each) for each in _INTEGERS}
_BYTES, _DENSE = tl.constexpr(BYTES), tl.constexpr(DENSE)
_BYTE = tl.constexpr(int(np.iinfo(GAPS[BYTES]).max))
_SHORT = tl.constexpr(int(np.iinfo(GAPS[SHORTS]).max))


class Looked(NamedTuple):
    """On the device, of some blocks: what `write` needs, and `sums`, int32, a row for each block:
    how many elements differ, and how many it lists with gaps of u8, and with gaps of u16.
    """

    table: torch.Tensor
    whose: torch.Tensor
    changed: torch.Tensor
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
def _compare(  # type: ignore[no-untyped-def]
    blocks,
    whose,
    changed,
    found,
    COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """The places of each tile that have changed, in the order in which they lie, and how many."""
    tile = tl.program_id(0)
    row = blocks + tl.load(whose + tile).to(tl.int64) * COLUMNS
    old = tl.load(row)
    new = tl.load(row + 1)
    begin = (tile - tl.load(row + 3)).to(tl.int32) * TILE
    end = tl.minimum(begin + TILE, tl.load(row + 2).to(tl.int32))
    changed += tile.to(tl.int64) * TILE
    number = 0
    for start in range(begin, end, STEP):
        was = _elements(old, start, end - start, ELEMENT, STEP)
        differ = (was != _elements(new, start, end - start, ELEMENT, STEP)).to(tl.int32)
        some = tl.sum(differ, 0)
        if some > 0:
            place = start - begin + tl.arange(0, STEP)
            tl.store(changed + number + tl.cumsum(differ, 0) - 1, place, mask=differ > 0)
            number += some
    tl.store(found + tile * 4, number)


@triton.jit  # type: ignore[untyped-decorator]
def _look(  # type: ignore[no-untyped-def]
    blocks, whose, changed, found, COLUMNS: tl.constexpr, TILE: tl.constexpr, SOME: tl.constexpr
):
    """Of each tile: the places in the block of the first and the last element that has changed, and
    how many bridges the gaps of u8 between these two need.
    """
    tile = tl.program_id(0)
    row = blocks + tl.load(whose + tile).to(tl.int64) * COLUMNS
    begin = (tile - tl.load(row + 3)).to(tl.int32) * TILE
    changed += tile.to(tl.int64) * TILE
    found += tile * 4
    number = tl.load(found)
    bridges = 0
    for start in range(0, number, SOME):
        nth = start + tl.arange(0, SOME)
        wanted = (nth > 0) & (nth < number)
        place = tl.load(changed + nth, mask=wanted, other=1).to(tl.int32)
        earlier = tl.load(changed + nth - 1, mask=wanted, other=0).to(tl.int32)
        bridges += tl.sum((place - earlier - 1) // _BYTE, 0)
    last = tl.load(changed + number - 1, mask=number > 0, other=0).to(tl.int32)
    tl.store(found + 1, begin + tl.load(changed, mask=number > 0, other=0).to(tl.int32))
    tl.store(found + 2, tl.where(number > 0, begin + last, -1))
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
    changed,
    found,
    places,
    COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    SOME: tl.constexpr,
):
    """What each tile has in the contents of its block; its first one the zeros in them, too."""
    tile = tl.program_id(0)
    row = blocks + tl.load(whose + tile).to(tl.int64) * COLUMNS
    new = tl.load(row + 1)
    begin = (tile - tl.load(row + 3)).to(tl.int32) * TILE
    end = tl.minimum(begin + TILE, tl.load(row + 2).to(tl.int32))
    kind = tl.load(row + 4)
    gaps = tl.load(row + 5)
    values = tl.load(row + 6).to(tl.pointer_type(ELEMENT))
    number = tl.load(found + tile * 4)
    if begin == 0:
        _fill_up(tl.load(row + 7))
        _fill_up(tl.load(row + 8))
    if kind == _DENSE:
        for start in range(begin, end, STEP):
            place = start + tl.arange(0, STEP)
            some = _elements(new, start, end - start, ELEMENT, STEP)
            tl.store(values + place, some, mask=place < end)
    elif number > 0:
        ours = new.to(tl.pointer_type(ELEMENT)) + begin
        before = tl.load(places + tile * 3) - begin
        changed += tile.to(tl.int64) * TILE
        if kind == _BYTES:
            at = tl.load(places + tile * 3 + 1)
            octets = gaps.to(tl.pointer_type(tl.uint8)) + at
            _list(ours, changed, number, before, octets, values + at, _BYTE, SOME)
        else:
            at = tl.load(places + tile * 3 + 2)
            shorts = gaps.to(tl.pointer_type(tl.uint16)) + at
            _list(ours, changed, number, before, shorts, values + at, _SHORT, SOME)


@triton.jit
def _fill_up(end):  # type: ignore[no-untyped-def]
    """With zeros, to the next multiple of 8."""
    place = tl.arange(0, 8)
    behind = end.to(tl.pointer_type(tl.int8)) + place
    tl.store(behind, tl.zeros((8,), tl.int8), mask=place < (8 - end % 8) % 8)


@triton.jit  # type: ignore[untyped-decorator]
def _list(  # type: ignore[no-untyped-def]
    new, changed, number, before, gaps, values, MOST: tl.constexpr, SOME: tl.constexpr
):
    """The gaps and the values of a tile. All places count from where it begins, as does `before`:
    that of the element which is listed before them.
    """
    at = 0
    for start in range(0, number, SOME):
        nth = start + tl.arange(0, SOME)
        wanted = nth < number
        place = tl.load(changed + nth, mask=wanted, other=0).to(tl.int32)
        earlier = tl.load(changed + nth - 1, mask=wanted & (nth > 0), other=0).to(tl.int32)
        gap = place - tl.where(nth > 0, earlier, before)
        bridges = tl.where(wanted, tl.maximum(gap - 1, 0) // MOST, 0)
        listed = tl.where(wanted, bridges + 1, 0)
        here = at + tl.cumsum(listed, 0) - 1
        tl.store(gaps + here, gap - bridges * MOST, mask=wanted)
        tl.store(values + here, tl.load(new + place, mask=wanted, other=0), mask=wanted)
        if tl.max(bridges, 0) > 0:
            inner = tl.where(nth > 0, bridges, 0)
            for ahead in range(tl.max(inner, 0)):
                value = tl.load(new + earlier + (ahead + 1) * MOST, mask=ahead < inner, other=0)
                tl.store(gaps + here - inner + ahead, MOST, mask=ahead < inner)
                tl.store(values + here - inner + ahead, value, mask=ahead < inner)
            outer = tl.max(bridges - inner, 0)  # before the first one of the tile
            for first in range(0, outer, SOME):
                bridge = first + tl.arange(0, SOME)
                far = before + (bridge + 1) * MOST
                value = tl.load(new + far, mask=bridge < outer, other=0)
                tl.store(gaps + bridge, MOST, mask=bridge < outer)
                tl.store(values + bridge, value, mask=bridge < outer)
        at += tl.sum(listed, 0)


def look(blocks: Numbers, itemsize: int, device: torch.device) -> Looked:
    """Begins to find out what has changed in these blocks.

    Args:
        blocks: a row for each: the addresses before and after, and how many elements it has.
        itemsize: of all elements: 1, 2, 4 or 8 bytes.
        device: the one that has both versions. It takes 2 bytes for each element meanwhile.
    """
    table, whose = tiles_of(blocks, blocks[:, 2], _TILE, device)
    tiles, columns = len(whose), table.shape[1]
    changed = torch.empty((tiles, _TILE), dtype=torch.int16, device=device)
    found = torch.empty((tiles, 4), dtype=torch.int32, device=device)
    places = torch.empty((tiles, 3), dtype=torch.int32, device=device)
    sums = torch.empty((len(blocks), 3), dtype=torch.int32, device=device)
    tile = {"COLUMNS": columns, "TILE": _TILE}
    _compare[(tiles,)](
        table, whose, changed, found, ELEMENT=_ELEMENTS[itemsize], STEP=_STEP, **tile
    )
    _look[(tiles,)](table, whose, changed, found, SOME=_SOME, num_warps=1, **tile)
    _add_up[(len(blocks),)](table, found, places, sums, TILES=_TILES, **tile)
    return Looked(table, whose, changed, found, places, sums)


def write(looked: Looked, contents: Numbers, itemsize: int) -> None:
    """Begins to write the contents of blocks that were looked at.

    Args:
        looked: what `look` returned.
        contents: a row for each block: its kind, and the addresses where its gaps and its values
            begin, and where they end.
        itemsize: as for `look`.
    """
    rest = torch.from_numpy(contents).to(looked.table.device)
    table = torch.cat([looked.table, rest], dim=1)
    _write[(len(looked.whose),)](
        table,
        looked.whose,
        looked.changed,
        looked.found,
        looked.places,
        COLUMNS=table.shape[1],
        ELEMENT=_ELEMENTS[itemsize],
        TILE=_TILE,
        STEP=_STEP,
        SOME=_SOME,
        num_warps=1,
    )
