"""The bytes of a delta: what changed in the tensors of a rank from one content to another. Pure.

A delta lies in a buffer of registered memory. It begins with a header of 128 bytes:

    offset 0    8 bytes   magic "ENGDELTA"; zero where there is no delta
    offset 8    u32       format, 1
    offset 12   u32       how many tensors the manifest has
    offset 16   16 bytes  content that the delta is applied to
    offset 32   16 bytes  content that it leads to
    offset 48   u64       bytes in all, with the header
    offset 56   u64       where the directory begins, from the beginning of the header
    offset 64   u32       how many sections there are
    offset 68   16 bytes  xxh3_128 of the directory
    offset 84   36 bytes  zero
    offset 120  u64       xxh3_64 of bytes 0 to 119

The sections follow the header, and the directory follows the sections. All numbers are
little-endian. Each tensor that changed has a section, and the directory has for it 48 bytes:

    offset 0    u32       number of the tensor, greater than the one before
    offset 4    u32       bytes of an element: 1, 2, 4 or 8
    offset 8    u64       where the section begins, from the beginning of the header
    offset 16   u64       bytes of the section, a multiple of 8
    offset 24   u64       how many elements the tensor has
    offset 32   16 bytes  xxh3_128 of the section

The number of a tensor is the place of its name among the sorted names of the manifest. Where
several names have the same memory, the first one has the section. An element is compared and copied
as an integer. One of 16 bytes counts as two of 8. The index of an element is its place in memory.

A section is of blocks of 16 MiB of the tensor; the last may be shorter. It begins with 8 bytes for
each block: u32 count, u8 kind, 3 bytes zero. Their contents follow, each in a multiple of 8 bytes:

    same     0   nothing; count 0
    bytes    1   `count` gaps of u8, filled up with zeros to 8 bytes, then `count` elements
    shorts   2   the same with gaps of u16
    dense    3   all elements of the block; `count` is their number

A gap is the distance to the element before it that is listed, or of the first one to the beginning
of the block. A distance that does not fit is bridged by elements that did not change. The directory
proves the sections and the header proves the directory, so each part can be read and proven alone.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import xxhash

from engine_loader.errors import DeltaDamaged
from engine_loader.planning.tied import tied_names
from engine_registry.schema.manifest import TensorEntry

_MAGIC = b"ENGDELTA"
_FORMAT = 1
_HEADER = struct.Struct("<8sII16s16sQQI16s36x")
_CHECK = struct.Struct("<Q")
HEADER_NBYTES = _HEADER.size + _CHECK.size
_LISTED = np.dtype(
    [
        ("number", "<u4"),
        ("itemsize", "<u4"),
        ("offset", "<u8"),
        ("nbytes", "<u8"),
        ("elements", "<u8"),
        ("digest", "V16"),
    ]
)
LISTED_NBYTES = _LISTED.itemsize
BLOCK_NBYTES = 16 << 20  # of a tensor
BLOCK = np.dtype([("count", "<u4"), ("kind", "u1"), ("zero", "V3")])
SAME, BYTES, SHORTS, DENSE = range(4)
GAPS: dict[int, np.dtype[Any]] = {BYTES: np.dtype("<u1"), SHORTS: np.dtype("<u2")}
_PADDING = 16  # at most, of the contents of a block


class DoesNotFit(Exception):
    """A delta into its buffer."""


@dataclass(frozen=True)
class DeltaHeader:
    """What a reader has to know before it reads the rest. `directory_offset` and `nbytes` count
    from the beginning of the header. The contents are in hexadecimal digits.
    """

    before: str
    after: str
    nbytes: int
    tensors: int
    sections: int
    directory_offset: int
    directory_digest: bytes

    @property
    def directory_nbytes(self) -> int:
        return self.sections * LISTED_NBYTES

    def must_lead(self, before: str, after: str) -> None:
        """DeltaDamaged unless it leads from the one content to the other."""
        if (self.before, self.after) != (before, after):
            raise DeltaDamaged(
                f"the delta leads from content {self.before} to {self.after}, not from {before} to "
                f"{after}"
            )

    def packed(self) -> bytes:
        """128 bytes, which `header_of` reads."""
        packed = _HEADER.pack(
            _MAGIC,
            _FORMAT,
            self.tensors,
            bytes.fromhex(self.before),
            bytes.fromhex(self.after),
            self.nbytes,
            self.directory_offset,
            self.sections,
            self.directory_digest,
        )
        return packed + _CHECK.pack(xxhash.xxh3_64_intdigest(packed))


@dataclass(frozen=True)
class Section:
    """Where the changes of one tensor lie, from the beginning of the header."""

    number: int
    itemsize: int
    offset: int
    nbytes: int
    elements: int
    digest: bytes

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


def header_of(data: bytes, entries: Collection[TensorEntry]) -> DeltaHeader | None:
    """The header of a delta of the rank whose manifest has these tensors.

    Args:
        data: the first `HEADER_NBYTES` bytes of a source's buffer, as they were read.
        entries: all tensors of the source's manifest.

    Returns:
        The header, whose sizes fit the tensors; None where there is no delta at this time.

    Raises:
        DeltaDamaged: the bytes are no header, or not one of these tensors.
    """
    if len(data) == HEADER_NBYTES and not any(data):
        return None
    if len(data) != HEADER_NBYTES or data[:8] != _MAGIC:
        raise DeltaDamaged("the bytes are not the header of a delta")
    if _CHECK.unpack_from(data, _HEADER.size) != (xxhash.xxh3_64_intdigest(data[: _HEADER.size]),):
        raise DeltaDamaged("the header of a delta is damaged: it differs from its checksum")
    _, number, tensors, before, after, nbytes, offset, sections, digest = _HEADER.unpack_from(data)
    if number != _FORMAT:
        raise DeltaDamaged(f"the delta has format {number}, and this version reads {_FORMAT}")
    header = DeltaHeader(before.hex(), after.hex(), nbytes, tensors, sections, offset, digest)
    if tensors != len(entries):
        raise DeltaDamaged(
            f"the delta is of {tensors} tensors, and the manifest has {len(entries)}"
        )
    if (
        sections > tensors
        or offset < HEADER_NBYTES
        or offset + header.directory_nbytes != nbytes
        or nbytes > capacity_of(entries)
    ):
        raise DeltaDamaged(
            f"the sizes in the header of a delta do not fit: {nbytes} bytes with {sections} "
            f"sections and a directory at {offset}"
        )
    return header


def directory_of(
    header: DeltaHeader, data: bytes, entries: Collection[TensorEntry]
) -> dict[str, Section]:
    """The sections of the tensors that changed, by all of their names.

    Args:
        header: what `header_of` returned.
        data: the header's `directory_nbytes` bytes at its `directory_offset`, as they were read.
        entries: all tensors of the source's manifest.

    Raises:
        DeltaDamaged: the bytes are not what the header states, or do not fit the tensors.
    """
    if len(data) != header.directory_nbytes:
        raise DeltaDamaged(
            f"the directory of a delta has {len(data)} bytes, not {header.directory_nbytes}"
        )
    if xxhash.xxh3_128_digest(data) != header.directory_digest:
        raise DeltaDamaged("the directory of a delta differs from its digest")
    names = sorted(entry.name for entry in entries)
    known = {entry.name: entry for entry in entries}
    sections: dict[str, Section] = {}
    last, end = -1, HEADER_NBYTES
    for number, itemsize, offset, nbytes, elements, digest in np.frombuffer(data, _LISTED).tolist():
        section = Section(number, itemsize, offset, nbytes, elements, bytes(digest))
        if not last < number < len(names) or offset != end:
            raise DeltaDamaged(f"the directory of a delta has tensor {number} in the wrong place")
        check_fits(section, known[names[number]])
        sections[names[number]] = section
        last, end = number, end + nbytes
    if end != header.directory_offset:
        raise DeltaDamaged("the sections of a delta do not end where its directory begins")
    return {
        name: sections[first] for name, first in first_names(entries).items() if first in sections
    }


def packed_directory(sections: Iterable[Section]) -> bytes:
    """Which `directory_of` reads."""
    rows = [
        (one.number, one.itemsize, one.offset, one.nbytes, one.elements, one.digest)
        for one in sections
    ]
    return np.array(rows, _LISTED).tobytes()


def check_fits(section: Section, entry: TensorEntry) -> None:
    """DeltaDamaged where a section cannot be one of this tensor."""
    if (
        not entry.nbytes
        or section.itemsize != itemsize_of(entry)
        or section.elements * section.itemsize != entry.nbytes
        or section.nbytes % 8
        or section.nbytes > _most_nbytes(entry)
    ):
        raise DeltaDamaged(
            f"{entry.name}: a section of {section.nbytes} bytes for {section.elements} elements of "
            f"{section.itemsize} bytes does not fit a tensor of {entry.nbytes} bytes"
        )


def itemsize_of(entry: TensorEntry) -> int:
    """Of the integers as which its elements are compared; the tensor has some."""
    return min(8, entry.nbytes // prod(entry.shape))


def block_length(itemsize: int) -> int:
    """How many elements of that size a block has."""
    return BLOCK_NBYTES // itemsize


def padded(nbytes: int) -> int:
    """With what fills it up to a multiple of 8."""
    return -(-nbytes // 8) * 8


def first_names(entries: Collection[TensorEntry]) -> Mapping[str, str]:
    """Of each name the first one that the same memory has."""
    firsts = {entry.name: entry.name for entry in entries}
    for names in tied_names(list(entries)):
        firsts |= dict.fromkeys(names, min(names))
    return firsts


def capacity_of(entries: Collection[TensorEntry], changed: float = 1.0) -> int:
    """How many bytes are enough for every delta of these tensors in which at most this share of
    the elements of each tensor changed.
    """
    return HEADER_NBYTES + sum(
        LISTED_NBYTES + _most_nbytes(entry, changed) for entry in entries if entry.nbytes
    )


def _most_nbytes(entry: TensorEntry, changed: float = 1.0) -> int:
    """Of a section. In each block the shortest kind is taken, and dense is one."""
    blocks, itemsize = -(-entry.nbytes // BLOCK_NBYTES), itemsize_of(entry)
    elements = entry.nbytes // itemsize
    listed = min(
        (elements * changed + elements / np.iinfo(gap).max) * (gap.itemsize + itemsize)
        for gap in GAPS.values()
    )
    most = min(entry.nbytes, int(listed) + 1)
    return padded(most + blocks * (BLOCK.itemsize + _PADDING))
