"""Memory that is exported by descriptors: what stands in the handle of an export, and how a reader
gets the descriptors.

An export is of allocations that lie one behind another, as the pieces of an expandable segment of
torch's do. Its handle has, little-endian:

    1 byte      the version: 1 for memory of a GPU, 2 for the host's
    32 bytes    the place at which the keeper hands descriptors out
    4 bytes     the number of the first allocation's descriptor; the others follow
    12 bytes    for each row of allocations of equal size: their size, and how many they are

So it never has the 64 bytes of a handle of CUDA's. The host's memory has an export for each
allocation. Pure, but for the descriptors.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from engine_loader.errors import EngineFailed
from engine_registry.errors import KeeperFailed
from engine_registry.registration.descriptors import (
    MOST_AT_ONCE,
    PLACE_NBYTES,
    DescriptorPlace,
    close_all,
    fetch,
)
from engine_registry.schema.manifest import Export
from engine_registry.schema.manifest_format import MAX_EXPORTS, MAX_HANDLE_NBYTES

_HEAD = struct.Struct(f"<B{PLACE_NBYTES}sI")
_ROW = struct.Struct("<QI")
_OF_GPU, _OF_HOST = 1, 2  # versions
_MOST_ROWS = (MAX_HANDLE_NBYTES - _HEAD.size) // _ROW.size


class Allocation(NamedTuple):
    """Memory with one handle."""

    addr: int
    nbytes: int
    handle: bytes  # empty where a descriptor takes its place
    on_host: bool = False

    @property
    def end(self) -> int:
        """The address behind the last byte."""
        return self.addr + self.nbytes


class Piece(NamedTuple):
    """Of an export, with a descriptor that is closed when the next one is asked for."""

    offset: int
    nbytes: int
    fd: int


@dataclass(frozen=True)
class Pieces:
    """What the handle of an export by descriptors says."""

    place: DescriptorPlace
    first: int  # number of a descriptor
    sizes: tuple[int, ...]
    on_host: bool = False

    def encode(self) -> bytes:
        rows = [(nbytes, len([*some])) for nbytes, some in itertools.groupby(self.sizes)]
        version = _OF_HOST if self.on_host else _OF_GPU
        head = _HEAD.pack(version, self.place.encode(), self.first)
        return head + b"".join([_ROW.pack(*row) for row in rows])

    @classmethod
    def decode(cls, export: Export) -> Pieces:
        """EngineFailed where the handle says nothing of the kind."""
        handle = export.handle
        if not is_by_descriptors(export):
            raise EngineFailed(f"a handle of {len(handle)} bytes is none of CUDA's")
        _, place, first = _HEAD.unpack_from(handle)
        rows = [*_ROW.iter_unpack(handle[_HEAD.size :])]
        if sum([count for _, count in rows]) > MAX_EXPORTS:
            raise EngineFailed(f"an export has more than {MAX_EXPORTS} allocations")
        found = cls(
            DescriptorPlace.decode(place),
            first,
            tuple([nbytes for nbytes, count in rows for _ in range(count)]),
            is_on_host(export),
        )
        if found.on_host and len(found.sizes) != 1:
            raise EngineFailed(f"{len(found.sizes)} allocations of the host are exported of one")
        if sum(found.sizes) != export.nbytes or 0 in found.sizes:
            raise EngineFailed(
                f"{export.nbytes} bytes are exported of an allocation of {sum(found.sizes)}"
            )
        return found

    def opened(self) -> Generator[Piece]:
        """Each with a descriptor, of which few are open at a time; EngineFailed."""
        offset = 0
        for begin in range(0, len(self.sizes), MOST_AT_ONCE):
            sizes = self.sizes[begin : begin + MOST_AT_ONCE]
            try:
                fds = fetch(self.place, self.first + begin, len(sizes))
            except KeeperFailed as exc:
                raise EngineFailed(exc.what, exc.remedy) from exc
            try:
                for nbytes, fd in zip(sizes, fds, strict=True):
                    yield Piece(offset, nbytes, fd)
                    offset += nbytes
            finally:
                close_all(fds)


def is_by_descriptors(export: Export) -> bool:
    """Whether its handle is the place of descriptors, not one of CUDA's."""
    rows_nbytes = len(export.handle) - _HEAD.size
    return (
        rows_nbytes > 0 and rows_nbytes % _ROW.size == 0 and export.handle[0] in (_OF_GPU, _OF_HOST)
    )


def is_on_host(export: Export) -> bool:
    """Whether its memory is the host's."""
    return is_by_descriptors(export) and export.handle[0] == _OF_HOST


def exports_of(allocations: Iterable[Allocation], place: DescriptorPlace) -> tuple[Export, ...]:
    """One for each handle, and one for allocations by descriptors that lie one behind another, but
    for the host's, of which each has one.

    Their descriptors are numbered in the order of their addresses.
    """
    exports: list[Export] = []
    run: list[Allocation] = []
    rows = number = 0

    def end_run() -> None:
        nonlocal rows, number
        if run:
            sizes = tuple([one.nbytes for one in run])
            pieces = Pieces(place, number, sizes, run[0].on_host)
            exports.append(Export(run[0].addr, run[-1].end - run[0].addr, pieces.encode()))
            number += len(run)
        run.clear()
        rows = 0

    for one in sorted(set(allocations)):
        if one.handle:
            exports.append(Export(one.addr, one.nbytes, one.handle))
            continue
        another = not run or one.nbytes != run[-1].nbytes
        apart = run and (one.addr != run[-1].end or one.on_host or run[-1].on_host)
        if apart or rows + another > _MOST_ROWS:
            end_run()
            another = True
        run.append(one)
        rows += another
    end_run()
    return tuple(sorted(exports, key=lambda export: export.addr))
