"""What a rank says of its memory, and what its keeper hands out of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from engine_loader.errors import EngineFailed
from engine_loader.sharing.pieces import Allocation, Pieces, exports_of, is_by_descriptors
from engine_registry.etcd.descriptors import check_left, explain
from engine_registry.registration.descriptors import DescriptorPlace, Descriptors, closed_on_error
from engine_registry.schema.manifest import Export, Region

_NOWHERE = DescriptorPlace(bytes(16), bytes(16))


class Memory(Protocol):
    """That of this process, as others can open it."""

    def allocations(self, region: Region) -> Sequence[Allocation]:
        """What the region lies in; EngineFailed where others cannot open all of it."""

    def descriptor(self, addr: int) -> int:
        """A new one of the allocation there, which the caller closes; EngineFailed."""


def check_whole(memory: Memory, region: Region) -> None:
    """EngineFailed unless a reader has the region in one place."""
    exports = exports_of(memory.allocations(region), _NOWHERE)
    if not any(one.addr <= region.addr and region.end <= one.end for one in exports):
        raise EngineFailed(
            f"{region.nbytes} bytes at {region.addr:#x} are not one allocation of CUDA's",
            "serve tensors of one allocation each",
        )


def are_by_descriptors(memory: Memory, region: Region) -> bool:
    """Whether all allocations of the region are opened by descriptors; EngineFailed."""
    return not any(one.handle for one in memory.allocations(region))


def describe(memory: Memory, regions: Sequence[Region]) -> tuple[Export, ...]:
    """The allocations that the regions lie in; EngineFailed."""
    found = {one for region in regions for one in memory.allocations(region)}
    return exports_of(found, DescriptorPlace.new())


def descriptors_of(memory: Memory, exports: Sequence[Export]) -> Descriptors | None:
    """New ones, of those exports that are by descriptors; None where none is. EngineFailed."""
    some = [(Pieces.decode(one), one.addr) for one in exports if is_by_descriptors(one)]
    if not some:
        return None
    addrs = [
        addr + offset
        for pieces, addr in sorted(some, key=lambda each: each[0].first)
        for offset in itertools.accumulate(pieces.sizes[:-1], initial=0)
    ]
    found = Descriptors(some[0][0].place)
    with closed_on_error(found):
        try:
            check_left(len(addrs))
            for addr in addrs:
                found.add(partial(memory.descriptor, addr))
        except OSError as exc:
            why, remedy = explain(exc)
            raise EngineFailed(
                f"{len(addrs)} allocations need a file descriptor each: {why}", remedy
            ) from exc
    return found
