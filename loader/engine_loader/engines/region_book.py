"""Which local memory is registered, or lent, and by how many callers. Pure."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from engine_loader.errors import EngineFailed
from engine_loader.planning.plan import ReadOp
from engine_registry.schema.manifest import Region

Regions = tuple[Region, ...]


class Begun(NamedTuple):
    parts: Regions  # that make up the region, each inside one registered region
    new: Regions  # those of them that the engine has to register


class RegionBook:
    """Engines refuse to register a byte twice, but publishers, or loaders, of one process may share
    memory, and the memory of one may lie between that of another. So a region is made of parts: the
    parts that lie in regions that are registered already, which count one use more, and new regions
    for the gaps. A registered region stays whole until nobody uses any of it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # of the engine, held during calls
        self._starts: list[int] = []  # sorted
        self._regions: dict[int, Region] = {}  # by start: registered ones, which never overlap
        self._uses: dict[int, int] = {}  # by start: how many regions of callers share bytes with it
        self._begun: Counter[Region] = Counter()  # by callers

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions.values())

    def __len__(self) -> int:
        return len(self._regions)

    def clear(self) -> None:
        self._starts, self._regions, self._uses, self._begun = [], {}, {}, Counter()

    def holder_of(self, addr: int, nbytes: int) -> Region | None:
        """The registered region in which all of these bytes lie."""
        place = bisect.bisect_right(self._starts, addr) - 1
        region = self._regions[self._starts[place]] if place >= 0 else None
        return region if region is not None and addr + nbytes <= region.end else None

    def check_destination(self, op: ReadOp, strides: bool = False) -> Region:
        """The registered region that the read goes to; EngineFailed."""
        if op.pieces:
            raise EngineFailed("this engine does not read many runs at once")
        if op.lines is not None and not strides:
            raise EngineFailed("this engine does not read runs at equal distances")
        region = self.holder_of(op.dst_addr, op.dst_nbytes)
        if region is None:
            raise EngineFailed(
                f"{op.nbytes} bytes at {op.dst_addr:#x} are not lent to the engine",
                "lend the destination first",
            )
        return region

    def begin(self, region: Region) -> Begun:
        parts, new = [], []
        at = region.addr
        self._begun[region] += 1
        touched = self._touched(region)
        if not touched:
            bisect.insort(self._starts, region.addr)
            self._regions[region.addr], self._uses[region.addr] = region, 1
            return Begun((region,), (region,))
        for one in touched:
            if at < one.addr:
                new.append(Region(at, one.addr - at))
                parts.append(new[-1])
            start, at = max(at, one.addr), min(one.end, region.end)
            parts.append(Region(start, at - start))
            self._uses[one.addr] += 1
        if at < region.end:
            new.append(Region(at, region.end - at))
            parts.append(new[-1])
        for one in new:
            bisect.insort(self._starts, one.addr)
            self._regions[one.addr], self._uses[one.addr] = one, 1
        return Begun(tuple(parts), tuple(new))

    def end(self, region: Region) -> Regions:
        """Ends one `begin` of the same region; what the engine has to unregister."""
        if not self._begun[region]:
            return ()
        self._begun[region] -= 1
        if not self._begun[region]:
            del self._begun[region]
        unused = []
        for one in self._touched(region):
            self._uses[one.addr] -= 1
            if not self._uses[one.addr]:
                del self._starts[bisect.bisect_left(self._starts, one.addr)]
                del self._regions[one.addr], self._uses[one.addr]
                unused.append(one)
        return tuple(unused)

    def _touched(self, region: Region) -> list[Region]:
        """The registered regions that share bytes with it, in their order."""
        first = bisect.bisect_right(self._starts, region.addr) - 1
        if first < 0 or self._regions[self._starts[first]].end <= region.addr:
            first += 1
        last = bisect.bisect_left(self._starts, region.end)
        return [self._regions[start] for start in self._starts[first:last]]
