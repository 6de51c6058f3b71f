"""What the kernels of deltas have around them: their tiles, and the host's look at what lies on a
GPU. Used by `encode_on_gpu` and `apply_on_gpu`, and their kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

Numbers = npt.NDArray[np.int64]
_PIECE_NBYTES = 8 << 20  # the host looks at one while the next one is copied


def on_one_gpu(tensors: Collection[torch.Tensor]) -> bool:
    """All of them, of which there are some."""
    devices = {tensor.device for tensor in tensors}
    return len(devices) == 1 and devices.pop().type == "cuda"


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched there, on the current stream of the device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def tiles_of(
    blocks: Numbers, counts: Numbers, tile: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of blocks with so many elements each, which are cut into tiles.

    Returns:
        The rows of the blocks, each with the number of its first tile as a last column; and for
        each tile the number of its block, int32. Both lie on the device.
    """
    tiles = -(-counts // tile)
    table = torch.from_numpy(np.column_stack([blocks, tiles.cumsum() - tiles])).to(device)
    whose = torch.repeat_interleave(
        torch.arange(len(blocks), dtype=torch.int32, device=device),
        torch.from_numpy(tiles).to(device),
        output_size=int(tiles.sum()),
    )
    return table, whose


def digests_of(
    data: torch.Tensor, spans: Sequence[tuple[int, int]], kept: Sequence[int] | None = None
) -> list[tuple[bytes, bytes]]:
    """The host's xxh3_128 of parts of bytes that may lie on a GPU.

    Args:
        data: uint8.
        spans: where each part begins and how long it is, one behind the other.
        kept: how many bytes of the beginning of each part are returned, too.
    """
    found = []
    start = spans[0][0] if spans else 0
    stop = spans[-1][0] + spans[-1][1] if spans else 0
    bytes_of = _Reader(data[start:stop])
    for number, (first, nbytes) in enumerate(spans):
        for _ in bytes_of.take(first - start):
            pass
        digest, begin = xxhash.xxh3_128(), bytearray()
        for some in bytes_of.take(nbytes):
            digest.update(some)
            if kept is not None:
                begin += some[: max(0, kept[number] - len(begin))]
        found.append((digest.digest(), bytes(begin)))
        start = first + nbytes
    return found


class _Reader:
    """Of bytes from their beginning on, in pieces that last until the next one."""

    def __init__(self, data: torch.Tensor) -> None:
        self._pieces = _pieces_of(data)
        self._rest = memoryview(b"")

    def take(self, nbytes: int) -> Iterator[memoryview]:
        while nbytes > 0:
            if not self._rest:
                self._rest = next(self._pieces)
            some = self._rest[:nbytes]
            self._rest = self._rest[len(some) :]
            nbytes -= len(some)
            yield some


def _pieces_of(data: torch.Tensor) -> Iterator[memoryview]:
    pieces = data.split(_PIECE_NBYTES)
    if data.is_cpu:
        yield from (piece.numpy().data for piece in pieces)
        return
    cells = [torch.empty_like(piece, device="cpu", pin_memory=True) for piece in pieces[:2]]
    events = [torch.cuda.Event() for _ in cells]
    for number in range(len(pieces) + 1):
        if number < len(pieces):
            cells[number % 2][: len(pieces[number])].copy_(pieces[number], non_blocking=True)
            events[number % 2].record()
        if number:
            events[(number - 1) % 2].synchronize()
            yield cells[(number - 1) % 2][: len(pieces[number - 1])].numpy().data
