"""The kernel that copies the rows of a table, from memory of whichever GPU to that of the one that
runs it, and sums up digests on the way. `table.py` makes the rows, and says what is in them.

A program copies one row. It takes the elements in their order, so a row of short runs keeps as many
loads in flight as one that is a single run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine_loader.kernels.compiling import Source

_TILE = 4096
_WARPS = 8
_ELEMENTS = {1: tl.constexpr(tl.int8), 2: tl.constexpr(tl.int16), 4: tl.constexpr(tl.int32)}


@triton.jit  # type: ignore[untyped-decorator]
def _copy_rows(table, sums, COLUMNS: tl.constexpr, ELEMENT: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of a row is that of `digests.kernel`: each word times its place's number of
    SplitMix64.
    """
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    src = tl.load(row).to(tl.pointer_type(ELEMENT))
    dst = tl.load(row + 1).to(tl.pointer_type(ELEMENT))
    width = tl.load(row + 2).to(tl.int32)
    src_step = tl.load(row + 3)
    dst_step = tl.load(row + 4)
    first = tl.load(row + 5).to(tl.int32)
    count = tl.load(row + 6).to(tl.int32)
    slot = tl.load(row + 7)
    ahead = tl.load(row + 8)
    if width >= first + count:  # in one run
        src += first
        dst += first
        if slot < 0:
            for start in range(0, count, TILE):
                place = start + tl.arange(0, TILE)
                wanted = place < count
                tl.store(dst + place, tl.load(src + place, mask=wanted), mask=wanted)
        else:
            total = tl.zeros((TILE,), tl.int64)
            for start in range(0, count, TILE):
                place = start + tl.arange(0, TILE)
                wanted = place < count
                word = tl.load(src + place, mask=wanted, other=0)
                tl.store(dst + place, word, mask=wanted)
                total += word.to(tl.int64) * _number(ahead + place)
            tl.atomic_add(sums + slot, tl.sum(total, 0))
    else:
        total = tl.zeros((TILE,), tl.int64)
        for start in range(0, count, TILE):
            place = start + tl.arange(0, TILE)
            wanted = place < count
            run = (first + place) // width
            along = (first + place) - run * width
            run = run.to(tl.int64)
            word = tl.load(src + (run * src_step + along), mask=wanted, other=0)
            tl.store(dst + (run * dst_step + along), word, mask=wanted)
            if slot >= 0:
                total += word.to(tl.int64) * _number(ahead + place)
        if slot >= 0:
            tl.atomic_add(sums + slot, tl.sum(total, 0))


@triton.jit
def _number(place):  # type: ignore[no-untyped-def]
    number = (place + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB
    return (number ^ (number >> 31)).to(tl.int64)


def copy_rows(table: torch.Tensor, sums: torch.Tensor, unit: int) -> None:
    """Begins to copy the rows, by Triton, on the current stream of the device that holds the table.

    Args:
        table: Rows by columns, int64, on the device that copies.
        sums: int64, one for each slot that the rows name, on the same device.
        unit: Bytes of an element: 1, 2 or 4. Only words of 4 bytes are summed up.
    """
    _copy_rows[(len(table),)](
        table,
        sums,
        COLUMNS=table.shape[1],
        ELEMENT=_ELEMENTS[unit],
        TILE=_TILE,
        num_warps=_WARPS,
    )


KERNELS = {
    f"copy_rows_{unit}": Source(_copy_rows, {"ELEMENT": element, "TILE": _TILE}, _WARPS)
    for unit, element in _ELEMENTS.items()
}
