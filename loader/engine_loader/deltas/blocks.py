"""What changed in one block of a tensor, in the form that a section has it. Pure.

On the CPU by numpy, which is quicker there and lets go of the GIL; elsewhere by torch. Both give
the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine_loader.deltas.format import BYTES, DENSE, GAPS, SAME

Numbers = npt.NDArray[Any]
_CHUNK_NBYTES = 1 << 20  # what is made of so many bytes stays in the processor's cache
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Block:
    """Its kind, and the elements that are listed: their gaps as bytes, and their values."""

    kind: int
    gaps: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return self.values.numel() if self.values is not None else 0


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in the order in which they lie in its memory. Those of 16
    bytes are two each.

    The result can be written to wherever the memory can be, as with tensors of inference mode.
    """
    flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        tensor.untyped_storage(), tensor.storage_offset(), (tensor.numel(),), (1,)
    )
    return flat.view(_INTEGERS[min(8, tensor.itemsize)])


def block_of(before: torch.Tensor, after: torch.Tensor) -> Block:
    """Of the same elements of a tensor in two versions, as integers."""
    if before.device.type == "cpu" and after.device.type == "cpu":
        return _by_numpy(before, after)
    return by_torch(before, after.to(before.device))


def _by_numpy(before: torch.Tensor, after: torch.Tensor) -> Block:
    old, new = before.numpy(), after.numpy()
    step = _CHUNK_NBYTES // new.itemsize
    found: list[tuple[Numbers, Numbers]] = []
    count = 0
    for start in range(0, len(new), step):
        where, values = _differing(old[start : start + step], new[start : start + step])
        if not len(where):
            continue
        found.append((where.astype(np.int32) + np.int32(start), values))
        count += len(where)
        if count * (1 + new.itemsize) >= new.nbytes:
            return Block(DENSE, None, after)
    if not found:
        return Block(SAME)
    places, values = (np.concatenate(side) for side in zip(*found, strict=True))
    gaps = np.diff(places, prepend=np.int32(0))
    bridges = {kind: _bridges(gaps, kind) for kind in GAPS}
    kind = _shortest({kind: count + int(some[1].sum()) for kind, some in bridges.items()}, new)
    if kind == DENSE:
        return Block(DENSE, None, after)
    far, fillers = bridges[kind]
    if len(far):
        most = np.iinfo(GAPS[kind]).max
        before_far = places[far] - gaps[far]  # the element that is listed before
        gaps[far] -= (fillers * most).astype(np.int32)
        nth = np.arange(1, fillers.sum() + 1) - np.repeat(np.cumsum(fillers) - fillers, fillers)
        at = np.repeat(far, fillers)
        values = np.insert(values, at, new[np.repeat(before_far, fillers) + nth * most])
        gaps = np.insert(gaps, at, most)
    packed = gaps.astype(GAPS[kind]).view(np.uint8)
    return Block(kind, torch.from_numpy(packed), torch.from_numpy(values))


def _differing(old: Numbers, new: Numbers) -> tuple[Numbers, Numbers]:
    """Where they differ, and the new elements there.

    numpy looks for eight elements that are not all the same first: it is slow where one of ten to
    one of a hundred is to be found.
    """
    mask = np.zeros(-(-len(new) // 8) * 8, np.bool_)
    np.not_equal(old, new, out=mask[: len(new)])
    eights = mask.view(np.int64)
    some = (eights != 0).nonzero()[0]
    inside = eights.take(some).view(np.bool_).nonzero()[0]
    where = (some << 3).take(inside >> 3)
    where += inside & 7
    return where, new.take(where)


def _bridges(gaps: Numbers, kind: int) -> tuple[Numbers, Numbers]:
    """The gaps that do not fit, and how many elements each needs before it."""
    most = np.iinfo(GAPS[kind]).max
    far = (gaps > most).nonzero()[0]
    return far, (gaps[far] - 1) // np.int64(most)


def _shortest(counts: dict[int, int], elements: Any) -> int:
    """Of these kinds, with so many elements each, and of all elements."""
    nbytes = {
        kind: count * (GAPS[kind].itemsize + elements.itemsize) for kind, count in counts.items()
    } | {DENSE: elements.nbytes}
    return min(nbytes, key=nbytes.__getitem__)


def by_torch(before: torch.Tensor, after: torch.Tensor) -> Block:
    """On the device of both, which is asked twice for numbers."""
    places = (before != after).nonzero().squeeze(1)
    count = places.numel()
    if not count:
        return Block(SAME)
    if count * (1 + after.itemsize) >= after.nbytes:
        return Block(DENSE, None, after)
    gaps = places.diff(prepend=places.new_zeros(1))
    ahead = (gaps - 1).clamp_(min=0)
    limits = {kind: int(np.iinfo(some).max) for kind, some in GAPS.items()}
    fillers = {kind: ahead // most for kind, most in limits.items()}
    sums = torch.stack([some.sum() for some in fillers.values()]).tolist()
    counts = {kind: count + more for kind, more in zip(fillers, sums, strict=True)}
    kind = _shortest(counts, after)
    if kind == DENSE:
        return Block(DENSE, None, after)
    if counts[kind] > count:
        ends = (fillers[kind] + 1).cumsum(0) - 1
        bridged = gaps.new_full((counts[kind],), limits[kind])
        bridged[ends] = gaps - fillers[kind] * limits[kind]
        gaps, places = bridged, bridged.cumsum(0)
    packed = gaps.to(torch.uint8 if kind == BYTES else torch.int16).view(torch.uint8)
    return Block(kind, packed, after[places])
