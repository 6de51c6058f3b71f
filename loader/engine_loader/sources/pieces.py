"""The part of a tensor of ours that a source has a digest of, in the order in which it lies in the
source's memory. Used where digests are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine_loader.planning.placed import steps_of
from engine_loader.sources.proofs import Piece
from engine_registry.schema.manifest import Slices


def part_of(tensor: torch.Tensor, along: Slices, piece: Piece) -> torch.Tensor:
    """What of the tensor, which holds these slices, is the piece: with its dimensions in the order
    in which they lie in the memory that the digest is of.
    """
    steps = steps_of(piece)
    order = sorted(range(tensor.ndim), key=lambda axis: -steps[axis])
    tensor = tensor.permute(order)
    for place, axis in enumerate(order):
        ours, theirs = along[axis], piece.along[axis]
        if ours != theirs:
            parts = [_slice(tensor, place, ours, *some) for some in theirs]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts, place).contiguous()
    return tensor


def _slice(
    tensor: torch.Tensor, axis: int, ours: Sequence[tuple[int, int]], start: int, stop: int
) -> torch.Tensor:
    """A view. It lies in one of the slices that the tensor holds along the axis."""
    ahead = 0
    for begin, end in ours:
        if begin <= start and stop <= end:
            return tensor.narrow(axis, ahead + start - begin, stop - start)
        ahead += end - begin
    raise ValueError(f"{start}:{stop} along dimension {axis} is not in the tensor")
