"""The kernel that `digests.sums` launches."""

from __future__ import annotations

import triton
import triton.language as tl

from engine_loader.kernels.compiling import Source

_TILE = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _sum_blocks(addrs, counts, sums, TILE: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program adds a part of a block, `counts` words at `addrs`, to its sum: each times its
    place's number of SplitMix64.
    """
    block = tl.program_id(0)
    words = tl.load(addrs + block).to(tl.pointer_type(tl.int32))
    count = tl.load(counts + block)
    share = tl.cdiv(tl.cdiv(count, PARTS), TILE) * TILE
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, count)
    total = tl.zeros((TILE,), tl.int64)
    for start in range(first, last, TILE):
        place = start + tl.arange(0, TILE)
        word = tl.load(words + place, mask=place < last, other=0).to(tl.int64)
        number = (place + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
        number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9
        number = (number ^ (number >> 27)) * 0x94D049BB133111EB
        number = number ^ (number >> 31)
        total += word * number.to(tl.int64)
    if first < last:
        tl.atomic_add(sums + block, tl.sum(total, 0))


KERNELS = {"sum_blocks": Source(_sum_blocks, {"TILE": _TILE}, warps=8)}
