"""Writes the changes of tensors into ours. Pure.

Called by a load that has read a delta. Its bytes may be anything: nothing of a section is written
before all of it is proven and has been found to fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import torch
import xxhash

from engine_loader.deltas.apply_on_gpu import apply_by_kernel
from engine_loader.deltas.blocks import as_integers
from engine_loader.deltas.format import DENSE, GAPS, SHORTS, Section
from engine_loader.deltas.places import Moved, Way, same_places, ways
from engine_loader.deltas.stated import (
    Change,
    Stated,
    check_digest,
    check_gaps,
    check_nbytes,
    stated,
    table_nbytes,
)
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.regions import strides_of
from engine_registry.schema.manifest import TensorEntry

_AT_ONCE = 1 << 20  # elements: their places take more memory than they do


@plain_torch()
def apply_all(data: torch.Tensor, changes: Sequence[Change]) -> None:
    """Brings tensors from the content before the delta to the one behind it.

    As `apply` does it with each of them. Where both lie on one GPU, kernels do it for all at once.

    Args:
        data: uint8, the bytes of the delta from its header on, in memory that nobody else writes
            to.
        changes: what the directory says of each tensor, both entries of it, and our tensor.

    Raises:
        DeltaDamaged: a section is not what the directory states, or does not fit the source's
            tensor. Others may have been applied.
        ValueError: a tensor is not as its entry says, or is not of one whole with the source's.
    """
    for each in changes:
        _check(each.src, each.tensor, each.dst)
    if apply_by_kernel(data, [each for each in changes if each.tensor.device == data.device]):
        changes = [each for each in changes if each.tensor.device != data.device]
    for section, src, tensor, dst in changes:
        apply(data[section.offset : section.end], section, src, tensor, dst)


@plain_torch()
def apply(
    data: torch.Tensor,
    section: Section,
    src: TensorEntry,
    tensor: torch.Tensor,
    dst: TensorEntry,
) -> None:
    """Brings a tensor from the content before the delta to the one behind it.

    Elements that our tensor does not hold are left out. What it holds and the source's does not is
    left as it is. A GPU may go on with the work after this returns.

    Args:
        data: uint8, the section's bytes as they were read, in memory that nobody else writes to.
        section: what the directory says of it.
        src: the source's entry of the tensor.
        tensor: ours, which has the content before. It may lie on any device.
        dst: our entry of it.

    Raises:
        DeltaDamaged: the bytes are not those that the directory states, or do not fit the source's
            tensor. Nothing was written.
        ValueError: the tensor is not as `dst` says, or is not of one whole with the source's.
    """
    _check(src, tensor, dst)
    blocks = _proven(data, section, src)
    ours = as_integers(tensor)
    data = data.to(ours.device)
    if data.storage_offset() % 8:  # integers are looked at where they lie
        data = data.clone()
    parts = section.elements // prod(src.shape)
    into = None if same_places(src, dst) else ways(src, dst, parts, ours.device)
    for block in blocks:
        values = data[block.values_at : block.values_at + block.count * section.itemsize]
        values = values.view(ours.dtype)
        if into is None and ours.is_cpu:
            _write_by_numpy(data, block, values, ours)
        elif into is None and block.kind == DENSE:
            ours[block.first : block.end].copy_(values)
        elif into is None:
            for places, some in _listed(data, block, values):
                ours.scatter_(0, places, some)
        else:
            for way in into:
                if way.start < block.end and block.first < way.stop:
                    for places, some in _moved(data, block, values, way):
                        ours.scatter_(0, places, some)


def _moved(data: torch.Tensor, block: Stated, values: torch.Tensor, way: Way) -> Iterator[Moved]:
    if block.kind != DENSE:
        for places, some in _listed(data, block, values):
            yield from way.of(places, some)
        return
    for number, some in enumerate(values.split(_AT_ONCE)):
        yield from way.of_run(block.first + number * _AT_ONCE, some)


def _check(src: TensorEntry, tensor: torch.Tensor, dst: TensorEntry) -> None:
    if (
        tuple(tensor.shape) != dst.shape
        or tensor.nbytes != dst.nbytes
        or strides_of(tensor) != dst.strides
    ):
        raise ValueError(f"{dst.name}: the tensor is not as its entry says")
    if (src.dtype, src.global_shape) != (dst.dtype, dst.global_shape):
        raise ValueError(f"{dst.name}: it is not of one whole with the source's")


def _proven(data: torch.Tensor, section: Section, src: TensorEntry) -> list[Stated]:
    """The blocks in which something changed."""
    nbytes = table_nbytes(section, src)
    packed = data.cpu().numpy()
    check_nbytes(packed.nbytes, section, src)
    check_digest(xxhash.xxh3_128_digest(packed.data), section, src)
    blocks = list(stated(packed[:nbytes].tobytes(), section, src))
    for block in blocks:
        if block.kind in GAPS:
            some = packed[block.gaps_at : block.gaps_at + block.gaps_nbytes]
            gaps = some.view(GAPS[block.kind])
            zeros = len(gaps) - 1 - np.count_nonzero(gaps[1:])
            check_gaps(block, int(gaps.sum(dtype=np.int64)), zeros, src)
    return blocks


def _write_by_numpy(
    data: torch.Tensor, block: Stated, values: torch.Tensor, ours: torch.Tensor
) -> None:
    """By one thread: torch would have all of its threads take part in each step, and wait for the
    last of them.
    """
    into = ours[block.first : block.end].numpy()
    if block.kind == DENSE:
        np.copyto(into, values.numpy())
        return
    packed = data[block.gaps_at : block.gaps_at + block.gaps_nbytes].numpy()
    gaps, changed, last = packed.view(GAPS[block.kind]), values.numpy(), 0
    for start in range(0, block.count, _AT_ONCE):
        places = gaps[start : start + _AT_ONCE].cumsum(dtype=np.int64)
        places += last
        into[places] = changed[start : start + _AT_ONCE]
        last = int(places[-1])


def _listed(data: torch.Tensor, block: Stated, values: torch.Tensor) -> Iterator[Moved]:
    """The places and the values of a block that is not dense, some after the others."""
    gaps = data[block.gaps_at : block.gaps_at + block.gaps_nbytes]
    if block.kind == SHORTS:
        gaps = gaps.view(torch.int16)
    last: int | torch.Tensor = block.first
    for gap, some in zip(gaps.split(_AT_ONCE), values.split(_AT_ONCE), strict=True):
        if block.kind == SHORTS:  # which torch knows with signs
            gap = gap.to(torch.int64) & 0xFFFF
        places = gap.cumsum(0, dtype=torch.int64)
        places += last
        last = places[-1]
        yield places, some
