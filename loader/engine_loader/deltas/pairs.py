"""The tensors of a rank in two versions, as a delta compares them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from engine_loader.deltas.blocks import as_integers
from engine_loader.deltas.format import block_length, first_names
from engine_loader.tensors.regions import strides_of
from engine_registry.schema.manifest import TensorEntry

Sides = tuple[torch.Tensor, torch.Tensor]  # a block before and after


class Pair(NamedTuple):
    """A tensor in two versions, as integers. The number is its own in the directory."""

    number: int
    before: torch.Tensor
    after: torch.Tensor

    @property
    def length(self) -> int:
        """In blocks."""
        return -(-self.after.numel() // block_length(self.after.itemsize))

    def blocks(self) -> Iterator[Sides]:
        step = block_length(self.after.itemsize)
        for start in range(0, self.after.numel(), step):
            yield self.before[start : start + step], self.after[start : start + step]


def pairs_of(
    entries: Sequence[TensorEntry],
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
) -> list[Pair]:
    """Of each memory that has bytes. ValueError where a tensor is not as its entry says."""
    numbers = {name: at for at, name in enumerate(sorted(entry.name for entry in entries))}
    firsts = first_names(entries)
    pairs = []
    for entry in sorted(entries, key=lambda entry: entry.name):
        if not entry.nbytes or firsts[entry.name] != entry.name:
            continue
        sides = before[entry.name], after[entry.name]
        for one in sides:
            if (
                tuple(one.shape) != entry.shape
                or one.nbytes != entry.nbytes
                or strides_of(one) != entry.strides
            ):
                raise ValueError(f"{entry.name}: the tensor is not as its entry says")
        pairs.append(Pair(numbers[entry.name], *map(as_integers, sides)))
    return pairs
