"""The sums of `multilinear_64` for all tensors on a GPU in one launch, by Triton. Called by `loader.digests`, which defines them.

Where Triton or the compiler that it needs is missing, `loader.digests` does without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_TILE = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _sum_blocks(addrs, counts, sums, TILE: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations as its own
    """Each program sums up one block: `counts` words at `addrs`, each times the number of its place of SplitMix64 from 0."""
    program = tl.program_id(0)
    words = tl.load(addrs + program).to(tl.pointer_type(tl.int32))
    count = tl.load(counts + program)
    total = tl.zeros((TILE,), tl.int64)
    for start in range(0, count, TILE):
        place = start + tl.arange(0, TILE)
        word = tl.load(words + place, mask=place < count, other=0).to(tl.int64)
        number = (place + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
        number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9
        number = (number ^ (number >> 27)) * 0x94D049BB133111EB
        number = number ^ (number >> 31)
        total += word * number.to(tl.int64)
    tl.store(sums + program, tl.sum(total, 0))


def sum_blocks(blocks: Sequence[tuple[int, int]], device: torch.device) -> bytes:
    """Of blocks of device memory, each an address and how many words of 32 bits: the sums, as 64-bit words one after another."""
    addrs, counts = (torch.tensor(column, dtype=torch.int64, device=device) for column in zip(*blocks, strict=True))
    sums = torch.empty_like(addrs)
    with torch.cuda.device(device):
        _sum_blocks[len(blocks),](addrs, counts, sums, TILE=_TILE)
    return sums.cpu().numpy().tobytes()
