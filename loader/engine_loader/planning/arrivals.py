"""What of the wanted bytes has come, and which blocks of our memory are whole, so that others may
read them from here. Pure.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from engine_loader.planning.boxes import Lines
from engine_loader.planning.reads import Span
from engine_registry.schema.manifest import Manifest, Region


class Blocks:
    """The regions of a rank's memory cut into blocks, which are numbered through all of them in
    their order.
    """

    def __init__(self, regions: Iterable[Region], nbytes: int) -> None:
        self._nbytes = nbytes
        self._regions: list[Region] = []
        self._firsts: list[int] = []  # the number of the first block of each region
        self._count = 0
        for region in sorted(regions, key=lambda region: region.addr):
            self._regions.append(region)
            self._firsts.append(self._count)
            self._count += -(-region.nbytes // nbytes)
        self._starts = [region.addr for region in self._regions]

    def __len__(self) -> int:
        return self._count

    def touched_by(self, addr: int, nbytes: int) -> range:
        """By bytes that lie in one region; ValueError else."""
        place = bisect.bisect_right(self._starts, addr) - 1
        if place < 0 or addr + nbytes > self._regions[place].end:
            raise ValueError(f"{nbytes} bytes at {addr:#x} lie in no region")
        ahead, first = addr - self._starts[place], self._firsts[place]
        return range(
            first + ahead // self._nbytes, first + (ahead + max(nbytes, 1) - 1) // self._nbytes + 1
        )

    def pieces(self, addr: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Of bytes in one region: the number of each block, and how many of them lie in it."""
        numbers = self.touched_by(addr, nbytes)
        place = bisect.bisect_right(self._starts, addr) - 1
        end = addr + nbytes
        for number in numbers:
            start = self._starts[place] + (number - self._firsts[place]) * self._nbytes
            yield number, min(end, start + self._nbytes) - max(addr, start)


class Runs:
    """A set of bytes, as the runs that it consists of."""

    def __init__(self) -> None:
        self._starts: list[int] = []  # sorted; runs neither overlap nor touch
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._ends, strict=True))

    def add(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of it is new."""
        new = self.gaps(start, end)
        first = bisect.bisect_left(self._ends, start)
        last = bisect.bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last], self._ends[first:last] = [start], [end]
        return new

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of these bytes is not there."""
        gaps = []
        place = bisect.bisect_right(self._ends, start)
        while start < end and place < len(self._starts) and self._starts[place] < end:
            if self._starts[place] > start:
                gaps.append((start, self._starts[place]))
            start = max(start, self._ends[place])
            place += 1
        if start < end:
            gaps.append((start, end))
        return gaps

    def within(self, start: int, end: int) -> int:
        """How many of these bytes are there."""
        return end - start - sum([stop - begin for begin, stop in self.gaps(start, end)])


class Arrivals:
    """For the tensors of a manifest, of one version of the weights.

    With `block_nbytes`, `blocks` has 1 for each block of the memory all of whose wanted bytes have
    come, and 0 for the others.
    """

    def __init__(self, manifest: Manifest, block_nbytes: int | None = None) -> None:
        self._tensors = manifest.tensors
        self._new: list[Span] = []  # that have not been looked at, as nobody has asked
        self._came = Runs()
        # by a tensor's address: bytes that came, but not in a row
        self._scattered: Counter[int] = Counter()
        self._blocks = Blocks(manifest.regions if block_nbytes else (), block_nbytes or 1)
        self._left = [0] * len(self._blocks)  # bytes, of each block
        if block_nbytes:
            wanted = Runs()
            for entry in manifest.tensors:
                for start, end in wanted.add(entry.addr, entry.addr + entry.nbytes):
                    self._count(start, end, +1)
        self.blocks = bytearray(not left for left in self._left)

    def _count(self, start: int, end: int, sign: int) -> list[int]:
        """Adds to what is left of the blocks; those that are touched."""
        touched = []
        for number, nbytes in self._blocks.pieces(start, end - start):
            self._left[number] += sign * nbytes
            touched.append(number)
        return touched

    @cached_property
    def _sizes(self) -> dict[int, int]:
        """Bytes of the longest tensor that begins at each address."""
        sizes: dict[int, int] = {}
        for entry in self._tensors:
            if entry.nbytes:
                sizes[entry.addr] = max(entry.nbytes, sizes.get(entry.addr, 0))
        return sizes

    @cached_property
    def _addrs(self) -> list[int]:
        return sorted(self._sizes)

    @property
    def nbytes(self) -> int:
        """How many of the wanted have come."""
        self._take_in()
        return sum(end - start for start, end in self._came) + sum(self._scattered.values())

    def add(self, spans: Iterable[Span]) -> None:
        """They have come, and are of that version. Each lies in the memory of the tensors."""
        self._new += spans
        if self._left:
            self._take_in()

    def _take_in(self) -> None:
        spans, self._new = self._new, []
        for span in spans:
            if not span.lines:
                self._add_run(span.dst_addr, span.dst_addr + span.nbytes)
            for some in span.lines:
                if some.counts:
                    self._scattered[self._tensor_at(some.dst)] += some.payload
                else:
                    self._add_run(some.dst, some.dst + some.nbytes)
        for addr, nbytes in list(self._scattered.items()):
            end = addr + self._sizes[addr]
            if self._came.within(addr, end) + nbytes == end - addr:
                del self._scattered[addr]
                self._add_run(addr, end)

    def _add_run(self, start: int, end: int) -> None:
        for begin, stop in self._came.add(start, end):
            if self._left:
                for number in self._count(begin, stop, -1):
                    self.blocks[number] = not self._left[number]

    def _tensor_at(self, addr: int) -> int:
        return self._addrs[bisect.bisect_right(self._addrs, addr) - 1]

    def missing(self, spans: Sequence[Span]) -> list[Span]:
        """What of the spans has not come.

        Of a tensor that comes in other than whole runs, that is all of it or nothing.
        """
        self._take_in()
        self._scattered.clear()
        if not any(self._came):
            return list(spans)
        rest = []
        for span in spans:
            if span.lines:
                lines = tuple([some for some in span.lines if not self._has(some)])
                if lines:
                    rest.append(span._replace(lines=lines, wanted=None))
            else:
                for start, end in self._came.gaps(span.dst_addr, span.dst_addr + span.nbytes):
                    srcs = tuple(
                        [(number, addr + start - span.dst_addr) for number, addr in span.srcs]
                    )
                    rest.append(Span(start, end - start, srcs))
        return rest

    def _has(self, some: Lines) -> bool:
        if not some.counts:
            return not self._came.gaps(some.dst, some.dst + some.nbytes)
        addr = self._tensor_at(some.dst)
        return not self._came.gaps(addr, addr + self._sizes[addr])

    def complete(self) -> list[str]:
        """Names of the tensors that are whole."""
        self._take_in()
        return [
            entry.name
            for entry in self._tensors
            if not self._came.gaps(entry.addr, entry.addr + entry.nbytes)
        ]
