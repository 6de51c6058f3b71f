"""The manifest: where each of a rank's tensors lies in its memory, and which part of the whole
tensor it holds. Pure.

`schema.manifest_format` writes and reads it as the parts that lie in etcd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

Slices = tuple[tuple[tuple[int, int], ...], ...]  # along each dimension: (start, stop) of each


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of one rank. Lengths of `shape`, `global_shape` and `offsets` are equal.

    A tensor that says nothing of the whole that it is part of is opaque: its global shape is its
    own and it begins at zero, and `opaque` is true, so that nobody takes it for the whole.
    """

    name: str
    dtype: str  # torch's name without the prefix: float32, bfloat16, float8_e4m3fn, …
    shape: tuple[int, ...]
    addr: int
    nbytes: int
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    opaque: bool = True
    strides: tuple[int, ...] | None = None  # see `dense_strides`
    # Of one that is several boxes of the whole, as a fused weight is: along each dimension, what of
    # the whole lies there one after another. `offsets` are the first starts then.
    slices: Slices | None = None

    @property
    def along(self) -> Slices:
        """Along each dimension, the slices of the whole that the tensor holds, in their order."""
        if self.slices is not None:
            return self.slices
        return tuple(
            [((start, start + size),) for start, size in zip(self.offsets, self.shape, strict=True)]
        )

    @property
    def boxes(self) -> int:
        """How many boxes of the whole it is."""
        return prod(map(len, self.slices)) if self.slices is not None else 1


class Region(NamedTuple):
    """A range of registered memory. One read stays inside one region."""

    addr: int
    nbytes: int

    @property
    def end(self) -> int:
        """The address behind the last byte."""
        return self.addr + self.nbytes


@dataclass(frozen=True)
class DigestTable:
    """Where in the rank's memory the digests of its tensors lie, by what algorithm: 16 bytes each,
    in the order of the names.

    With `block_nbytes`, the digests of blocks lie behind them, in the same order: of each tensor
    that is longer than a block, those of all its blocks of so many bytes. The last one of a tensor
    may be shorter.
    """

    algorithm: str
    addr: int
    block_nbytes: int = 0

    def blocks_of(self, nbytes: int) -> int:
        """How many digests of blocks a tensor of so many bytes has besides its own."""
        if not self.block_nbytes or nbytes <= self.block_nbytes:
            return 0
        return -(-nbytes // self.block_nbytes)

    def slots(self, sizes: Mapping[str, int]) -> dict[str, range]:
        """Of each tensor, by its name: the places in the table of the digests of its blocks, or of
        its own where it is no longer than a block. `sizes` are the bytes of all tensors.
        """
        found: dict[str, range] = {}
        behind = len(sizes)
        for place, name in enumerate(sorted(sizes)):
            blocks = self.blocks_of(sizes[name])
            found[name] = range(behind, behind + blocks) if blocks else range(place, place + 1)
            behind += blocks
        return found


@dataclass(frozen=True)
class Export:
    """An allocation that holds regions, and the handle by which other processes of the host map it
    into their memory. What the handle is depends on the protocol.
    """

    addr: int
    nbytes: int
    handle: bytes

    @property
    def end(self) -> int:
        """The address behind the last byte."""
        return self.addr + self.nbytes


@dataclass(frozen=True)
class Manifest:
    """The tensors of a rank, and the regions of memory that peers may read."""

    tensors: tuple[TensorEntry, ...]
    regions: tuple[Region, ...]
    digests: DigestTable | None = None
    # JSON, by name: what a state dict holds besides tensors
    values: Mapping[str, Any] = field(default_factory=dict)
    # each such block of the regions has a mark behind the header: whether it can be read; 0: none
    block_nbytes: int = 0
    # of protocols that map memory, rather than to ask for it: also of header and digests
    exports: tuple[Export, ...] = ()
    # buffers each of which may hold a delta: what changed from one content to the next
    deltas: tuple[Region, ...] = ()

    @cached_property
    def nbytes(self) -> int:
        """The bytes of all tensors; tied tensors count for each name."""
        return sum(entry.nbytes for entry in self.tensors)

    def shifted(self, by: int) -> Manifest:
        """The same tensors, regions and digests so many bytes further on. Exports stay, as they
        are of allocations, and deltas, as they are of several contents.
        """
        if not by:
            return self
        digests = self.digests
        return replace(
            self,
            tensors=tuple(
                [replace(one, addr=one.addr + by) if one.nbytes else one for one in self.tensors]
            ),
            regions=tuple([Region(region.addr + by, region.nbytes) for region in self.regions]),
            digests=replace(digests, addr=digests.addr + by) if digests is not None else None,
        )

    @property
    def marks(self) -> int:
        """How many there are: one for each block that is begun."""
        return (
            sum(-(-region.nbytes // self.block_nbytes) for region in self.regions)
            if self.block_nbytes
            else 0
        )


def dense_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """None where the elements lie row by row; else how many elements lie between neighbours in each
    dimension.

    ValueError unless the dimensions, in some order, fill the memory without gaps. A dimension of
    size 1 has stride 1.
    """
    expected = 1
    for stride, size in sorted(
        (stride, size) for size, stride in zip(shape, strides, strict=True) if size != 1
    ):
        if stride != expected:
            raise ValueError(
                f"strides {tuple(strides)} of shape {tuple(shape)} leave gaps or overlap"
            )
        expected *= size
    some = [stride for size, stride in zip(shape, strides, strict=True) if size != 1]
    if some == sorted(some, reverse=True):
        return None
    return tuple([1 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)])


def shape_text(shape: Sequence[int]) -> str:
    """For people: 4096x128, or scalar."""
    return "x".join(map(str, shape)) if shape else "scalar"
