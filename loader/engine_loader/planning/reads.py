"""Spans of memory that are read at once, and how to make few, long ones of many. Pure.

What lies in one run on both sides is read straight to its place, together with its neighbours. What
lies in many short runs is read into a staging buffer, with what lies between the runs, and copied
from there, where that costs less: see `Costs`. An engine that strides or scatters reads such runs
to their places, and nothing else.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from engine_loader.planning.boxes import Lines
from engine_registry.schema.manifest import Region

# What `bundle` puts together: runs shorter than this, and so many at most.
_SHORT_NBYTES, _MOST_RUNS = 256 << 10, 1000
# (number of a source, address there), for each that holds the same bytes
Srcs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Costs:
    """What a read and a copy cost besides their bytes, and what copying a byte costs, all in bytes
    that could be read meanwhile.
    """

    read_nbytes: int = 96 << 10  # tcp on loopback: some 40 µs, at 2 to 3 GB/s
    copy_nbytes: int = 0
    copied: float = 0.3
    staged_nbytes: int = 4 << 20  # the most that one read of many short runs brings
    strided: bool = False  # runs at equal distances are one read: nothing is staged
    scattered: bool = False  # and so are short runs anywhere in a region


class Span(NamedTuple):
    """`nbytes` bytes in a row, for each source that holds them: where. They go to our `dst_addr`;
    or, with `lines`, to a staging buffer, and from there (`src` counts from its beginning) to our
    memory (`dst` is an address). If it is `direct`, only the bytes of its `lines` are read,
    straight to their places, of which `dst_addr` is the first. These are runs at equal distances,
    or several single runs. `wanted` is how many bytes the lines have, if they have been counted.
    """

    dst_addr: int
    nbytes: int
    srcs: Srcs
    lines: tuple[Lines, ...] = ()
    direct: bool = False
    wanted: int | None = None

    @property
    def payload(self) -> int:
        """Bytes that are wanted, of those that are read."""
        if self.wanted is not None:
            return self.wanted
        return sum(some.payload for some in self.lines) if self.lines else self.nbytes

    @property
    def read_nbytes(self) -> int:
        """Bytes that are read."""
        return self.payload if self.direct else self.nbytes

    @property
    def staged(self) -> bool:
        return bool(self.lines) and not self.direct

    def cut(self, max_nbytes: int) -> Iterator[Span]:
        if self.direct and self.lines[0].counts:
            for some in self.lines[0].pieces(max_nbytes):
                yield _strided(self.srcs, some)
            return
        if self.lines:
            yield self
            return
        for start in range(0, self.nbytes, max_nbytes):
            nbytes = min(max_nbytes, self.nbytes - start)
            yield Span(
                self.dst_addr + start,
                nbytes,
                tuple([(number, addr + start) for number, addr in self.srcs]),
            )


def payload_of(spans: Iterable[Span]) -> int:
    """Bytes that all of them bring."""
    return sum([span.payload for span in spans])


def span_of(srcs: Srcs, some: Lines) -> Span:
    """One that brings all of the lines.

    `some.src` counts from the addresses of `srcs`, `some.dst` is an address.
    """
    if some.counts:
        return Span(0, some.extent, _further(srcs, some.src), (some._replace(src=0),))
    return Span(some.dst, some.nbytes, _further(srcs, some.src))


def _strided(srcs: Srcs, some: Lines) -> Span:
    """As `span_of`, for an engine that strides."""
    if not some.counts:
        return span_of(srcs, some)
    lines = (some._replace(src=0),)
    return Span(some.dst, some.extent, _further(srcs, some.src), lines, direct=True)


def _further(srcs: Srcs, by: int) -> Srcs:
    return tuple([(number, addr + by) for number, addr in srcs]) if by else srcs


def coalesce(
    spans: Iterable[Span], src_regions: Sequence[Sequence[Region]], dst_regions: Sequence[Region]
) -> list[Span]:
    """Joins spans without lines that follow each other here and at every source, as far as the
    registered regions reach.
    """
    src_tables, dst_table = _tables(src_regions), _RegionTable(dst_regions)
    joined: list[Span] = []
    room = 0  # how far the last one may grow
    for span in sorted(spans, key=lambda span: span.dst_addr):
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.dst_addr + last.nbytes == span.dst_addr
            and last.nbytes + span.nbytes <= room
            and _further(last.srcs, last.nbytes) == span.srcs
        ):
            joined[-1] = Span(last.dst_addr, last.nbytes + span.nbytes, last.srcs)
            continue
        joined.append(span)
        room = min(dst_table.room_at(span.dst_addr), _room(src_tables, span.srcs))
    return joined


def gather(
    spans: Iterable[Span], src_regions: Sequence[Sequence[Region]], costs: Costs
) -> list[Span]:
    """Short spans that lie near each other at their sources, though not here, become one read into
    a staging buffer.
    """
    src_tables = _tables(src_regions)
    gathered, groups = _alike(spans, lambda span: _copying(span.nbytes, costs) < costs.read_nbytes)
    for group in groups:
        members: list[Span] = []
        end = limit = 0
        for span in group:
            start = span.srcs[0][1]
            # is copied only if it does not stay alone
            alone = _copying(members[0].nbytes, costs) if len(members) == 1 else 0.0
            worth = start - end + alone + _copying(span.nbytes, costs) < costs.read_nbytes
            if members and start >= end and worth and start + span.nbytes <= limit:
                members.append(span)
            else:
                gathered += _as_one(members)
                members = [span]
                limit = start + min(_room(src_tables, span.srcs), costs.staged_nbytes)
            end = start + span.nbytes
        gathered += _as_one(members)
    return gathered


def bundle(
    spans: Iterable[Span], src_regions: Sequence[Sequence[Region]], costs: Costs
) -> list[Span]:
    """Short spans that lie in one region of each source become one read to their places."""
    most_nbytes = costs.staged_nbytes
    src_tables = _tables(src_regions)
    bundled, groups = _alike(spans, lambda span: span.nbytes < _SHORT_NBYTES)
    for group in groups:
        members: list[Span] = []
        payload = limit = 0
        for span in group:
            start = span.srcs[0][1]
            full = len(members) == _MOST_RUNS or payload >= most_nbytes
            if full or not payload or start + span.nbytes > limit:
                bundled += _as_one(members, direct=True)
                members, payload = [], 0
                limit = start + _room(src_tables, span.srcs)
            members.append(span)
            # one that no region holds stays alone
            payload += span.nbytes if start + span.nbytes <= limit else most_nbytes
        bundled += _as_one(members, direct=True)
    return bundled


def _alike(
    spans: Iterable[Span], is_short: Callable[[Span], bool]
) -> tuple[list[Span], list[list[Span]]]:
    """Those that are not short; and the others in groups, each of spans that lie in the same way at
    every source, in their order there.
    """
    rest: list[Span] = []
    groups: defaultdict[object, list[Span]] = defaultdict(list)
    for span in spans:
        if is_short(span):
            first = span.srcs[0][1]
            groups[tuple([(number, addr - first) for number, addr in span.srcs])].append(span)
        else:
            rest.append(span)
    return rest, [sorted(group, key=lambda span: span.srcs) for group in groups.values()]


def _copying(nbytes: int, costs: Costs) -> float:
    return costs.copy_nbytes + costs.copied * nbytes


def _as_one(members: Sequence[Span], direct: bool = False) -> Sequence[Span]:
    if len(members) < 2:
        return members
    first = members[0]
    start = first.srcs[0][1]
    extent = max([span.srcs[0][1] + span.nbytes for span in members]) - start
    some = tuple([Lines(span.srcs[0][1] - start, span.dst_addr, span.nbytes) for span in members])
    wanted = sum([span.nbytes for span in members])
    return [Span(first.dst_addr if direct else 0, extent, first.srcs, some, direct, wanted)]


def cut_lines(span: Span, costs: Costs) -> Iterator[Span]:
    """The cheapest way to read runs at equal distances: along some axes one by one, and the rest
    into a staging buffer; or all at once.
    """
    for lines in span.lines:
        if costs.strided:
            yield _strided(span.srcs, lines)
            continue
        one_by_one, at_once = _cheapest(lines, costs)
        for some in lines.along(one_by_one):
            for few in some.split(at_once):
                yield span_of(span.srcs, few)


def _cheapest(some: Lines, costs: Costs) -> tuple[int, int]:
    """Along how many of the first axes to read one by one, and how much along the next one to read
    at once.
    """
    times = prod(some.counts)
    best = len(some.counts), 1
    least: float = times * (costs.read_nbytes + some.nbytes)
    extent = payload = some.nbytes  # of one along the axis
    for axis in reversed(range(len(some.counts))):
        count, step = some.counts[axis], some.src_steps[axis]
        at_once = min(count, 1 + (costs.staged_nbytes - extent) // step)
        if at_once < 2:  # nor is there room for what is longer
            break
        times //= count
        reads = -(-count // at_once)
        nbytes = extent + (count - 1) * step - (reads - 1) * (step - extent)
        payload *= count
        cost = times * (
            reads * (costs.read_nbytes + costs.copy_nbytes) + nbytes + costs.copied * payload
        )
        if cost < least:
            best, least = (axis, at_once), cost
        extent += (count - 1) * step
    return best


def _tables(regions: Sequence[Sequence[Region]]) -> list[_RegionTable]:
    return [_RegionTable(some) for some in regions]


def _room(tables: Sequence[_RegionTable], srcs: Srcs) -> int:
    """As much as there is at every source."""
    return min([tables[number].room_at(addr) for number, addr in srcs])


class _RegionTable:
    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = sorted(regions, key=lambda region: region.addr)
        self._starts = [region.addr for region in self._regions]

    def room_at(self, addr: int) -> int:
        """How many bytes there are from `addr` to the end of the region that holds it; 0 where
        there is none.
        """
        place = bisect.bisect_right(self._starts, addr) - 1
        return max(0, self._regions[place].end - addr) if place >= 0 else 0
