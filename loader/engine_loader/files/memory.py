"""Memory for weights: tensors that lie in one block, for files and for the ranks of manifests. Such
a block registers as one region, and fills with few, long reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch

from engine_loader.errors import (
    LoaderError,
    TensorsUnusable,
    WeightsFileInvalid,
    WeightsMismatch,
    listed,
)
from engine_loader.files.stored import Files
from engine_loader.tensors.arena import bytes_in_arena
from engine_loader.tensors.dtypes import dtype_named
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.shards import Shard, shard_of
from engine_registry import Manifest

Strides = tuple[int, ...] | None  # as in TensorEntry
_Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def memory_for(files: Files, *, in_arenas: bool = False) -> dict[str, torch.Tensor]:
    """Uninitialised tensors for all that the files hold, each file's in one block, in the order in
    which it lies there. With `in_arenas` each block is an `Arena`, which a keeper can hold.

    WeightsFileInvalid names the tensors for which torch has no dtype.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path, layout in zip(files.paths, files.layouts(), strict=True):
        unknown = [
            f"{name}: {dtype} {list(shape)}"
            for name, (dtype, shape) in layout.items()
            if not isinstance(getattr(torch, dtype, None), torch.dtype)
        ]
        if unknown:
            raise WeightsFileInvalid(
                f"{path} cannot be read: torch {torch.__version__} has no dtype for "
                f"{listed(unknown)}",
                "upgrade torch, or store such bytes as U8",
                path=str(path),
                tensors=unknown,
            )
        known = {name: (dtype_named(dtype), shape) for name, (dtype, shape) in layout.items()}
        tensors |= allocate(known, memory=_arena_for(known) if in_arenas else None)
    return tensors


def _arena_for(layout: _Layout) -> torch.Tensor | None:
    """LoaderError where there is no such memory."""
    nbytes = extent(layout)
    return bytes_in_arena("cpu", nbytes) if nbytes else None


@plain_torch()
def allocate(
    layout: _Layout, device: str = "cpu", memory: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Uninitialised tensors that lie one after another in a single block, in the order of `layout`;
    in `memory`, where it is given.

    Two blocks of one layout have their tensors at the same distances, so a load between them needs
    few, long reads. LoaderError where there is no such memory, or no such tensor.
    """
    block = block_of(extent(layout), device) if memory is None else memory
    return {
        name: _view(name, block[start:stop], dtype, shape)
        for (name, (dtype, shape)), (start, stop) in zip(
            layout.items(), _places(layout), strict=True
        )
    }


def _view(
    name: str, memory: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """TensorsUnusable where the shape has a size that torch cannot count to, which no bytes need
    where another is 0.
    """
    try:
        return memory.view(dtype).view(shape)
    except (RuntimeError, TypeError, OverflowError) as exc:
        raise TensorsUnusable(
            f"{name}: torch has no tensor of shape {list(shape)}", "give it another"
        ) from exc


@plain_torch()
def block_of(nbytes: int, device: str = "cpu") -> torch.Tensor:
    """Uninitialised bytes; LoaderError where there are not as many."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except (
        RuntimeError,
        MemoryError,
        TypeError,
        ValueError,
        OverflowError,
    ) as exc:  # torch has no one kind for it
        raise LoaderError(
            f"there is no memory for {nbytes} bytes of weights on {device}: nothing was read"
        ) from exc


def extent(layout: _Layout) -> int:
    """How many bytes `allocate` needs."""
    return max((stop for _, stop in _places(layout)), default=0)


def _places(layout: _Layout) -> Iterator[tuple[int, int]]:
    end = 0
    for dtype, shape in layout.values():
        # no gaps but those that the dtypes need: gaps end a read
        start = -(-end // dtype.itemsize) * dtype.itemsize
        end = start + prod(shape) * dtype.itemsize
        yield start, end


def allocate_like(manifest: Manifest, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Tensors to load a rank into that has this manifest, in the order in which they lie in its
    memory.

    WeightsMismatch where one does not have as many bytes as its shape takes: before there is memory
    for what it claims.
    """
    entries = sorted(manifest.tensors, key=lambda entry: (entry.addr, entry.name))
    layout = {entry.name: (dtype_named(entry.dtype), entry.shape) for entry in entries}
    for entry in entries:
        nbytes = prod(entry.shape) * layout[entry.name][0].itemsize
        if nbytes != entry.nbytes:
            raise WeightsMismatch(
                f"{entry.name}: the source has {entry.nbytes} bytes of it, its shape "
                f"{list(entry.shape)} of {entry.dtype} takes "
                f"{nbytes}: nothing was read",
                problems=[entry.name],
            )
    return with_strides(allocate(layout, device), {entry.name: entry.strides for entry in entries})


@plain_torch()
def with_strides(
    tensors: Mapping[str, torch.Tensor], strides: Mapping[str, Strides]
) -> dict[str, torch.Tensor]:
    """The same memory, in which those tensors that have strides lie as these say."""
    return {
        name: tensor if (some := strides[name]) is None else tensor.as_strided(tensor.shape, some)
        for name, tensor in tensors.items()
    }


def shards_like(manifest: Manifest) -> dict[str, Shard]:
    """Which part of the whole the rank's tensors are, where it says so."""
    return {entry.name: shard_of(entry) for entry in manifest.tensors if not entry.opaque}
