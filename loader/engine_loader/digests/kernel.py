"""The sums of `multilinear_64` for all tensors on a GPU in one launch, by Triton. Called by
`digests.table`, which defines them.

Where Triton or the compiler that it needs is missing, `digests.table` does without.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

Numbers = npt.NDArray[np.int64]
_TILE = 1024
_PARTS = (
    16  # of a block, each summed up by itself: a few tensors alone have to keep all of a GPU busy
)


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


def sum_blocks(addrs: Numbers, counts: Numbers, device: torch.device) -> bytes:
    """Of blocks of device memory, at these addresses and of so many words of 32 bits: the sums, as
    64-bit words in a row.
    """
    where, words = torch.from_numpy(np.stack([addrs, counts])).to(device)
    sums = torch.zeros_like(where)
    with torch.cuda.device(device):
        _sum_blocks[len(addrs), _PARTS](where, words, sums, TILE=_TILE, PARTS=_PARTS, num_warps=8)
    return sums.cpu().numpy().tobytes()
