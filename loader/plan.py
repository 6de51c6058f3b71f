"""From two manifests to the reads that fill one from the other. Pure: no torch, no network.

Adjectives name the side: `src_addr` lies in the memory of the rank read from, `dst_addr` in that of the process being filled.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from loader.errors import WeightsMismatch, listed
from registry.manifest import Manifest, Region, TensorEntry


@dataclass(frozen=True)
class ReadOp:
    """Copy `nbytes` bytes from the source's `src_addr` to our `dst_addr`. Stays inside one registered region on either side."""

    source: str
    src_addr: int
    dst_addr: int
    nbytes: int


@dataclass(frozen=True)
class Span:
    """`nbytes` bytes at our `dst_addr`, and where each of several sources holds them: `src_addrs`, in the order of the sources."""

    dst_addr: int
    nbytes: int
    src_addrs: tuple[int, ...]

    def read(self, source: str, number: int) -> ReadOp:
        """From the source that is the `number`th."""
        return ReadOp(source, self.src_addrs[number], self.dst_addr, self.nbytes)

    def cut(self, max_nbytes: int) -> Iterator[Span]:
        for start in range(0, self.nbytes, max_nbytes):
            nbytes = min(max_nbytes, self.nbytes - start)
            yield Span(self.dst_addr + start, nbytes, tuple(addr + start for addr in self.src_addrs))


def plan(source: str, src: Manifest, dst: Manifest) -> tuple[ReadOp, ...]:
    """The reads that fill every tensor of `dst` from the tensor of the same name in `src`, in the order of their destinations.

    WeightsMismatch names every difference between the two; it is raised before any op exists.
    """
    _refuse(source, differences(src.tensors, dst.tensors))
    src_addrs = {entry.name: entry.addr for entry in src.tensors}
    problems: list[str] = []
    ops: list[ReadOp] = []
    last_name = ""
    for entry in sorted((entry for entry in dst.tensors if entry.nbytes), key=lambda entry: entry.addr):
        op = ReadOp(source, src_addrs[entry.name], entry.addr, entry.nbytes)
        last = ops[-1] if ops else None
        if last is None or op.dst_addr >= last.dst_addr + last.nbytes:
            ops.append(op)
            last_name = entry.name
        elif op.src_addr - op.dst_addr == last.src_addr - last.dst_addr:  # tied, or views of each other, on both sides
            nbytes = max(last.dst_addr + last.nbytes, op.dst_addr + op.nbytes) - last.dst_addr
            ops[-1] = ReadOp(source, last.src_addr, last.dst_addr, nbytes)
        else:
            problems.append(f"{entry.name}: shares memory with {last_name} here, but not in the same way in the source")
    _refuse(source, problems)
    ops = coalesce(ops, src.regions, dst.regions)
    check_coverage(ops, dst.tensors)
    return tuple(ops)


def alternates(plans: Sequence[Sequence[ReadOp]]) -> tuple[Span, ...]:
    """The reads of several plans for one destination, cut where any of them is, so that each can come from any source."""
    if len(plans) == 1:
        return tuple(Span(op.dst_addr, op.nbytes, (op.src_addr,)) for op in plans[0])
    ends = [iter(plan) for plan in plans]
    heads = [next(ops, None) for ops in ends]
    spans: list[Span] = []
    while all(heads):
        ops = [op for op in heads if op is not None]
        nbytes = min(op.nbytes for op in ops)
        if any(op.dst_addr != ops[0].dst_addr for op in ops):
            break
        spans.append(Span(ops[0].dst_addr, nbytes, tuple(op.src_addr for op in ops)))
        for number, op in enumerate(ops):
            rest = ReadOp(op.source, op.src_addr + nbytes, op.dst_addr + nbytes, op.nbytes - nbytes)
            heads[number] = rest if rest.nbytes else next(ends[number], None)
    if any(heads):
        raise ValueError("the plans do not fill the same memory")
    return tuple(spans)


def differences(src: Sequence[TensorEntry], dst: Sequence[TensorEntry]) -> list[str]:
    """One line for every tensor that the source lacks, that the destination lacks, or that is not the same in both."""
    src_by_name = {entry.name: entry for entry in src}
    dst_names = {entry.name for entry in dst}
    lines = [f"{entry.name}: in the source, but not here" for entry in src if entry.name not in dst_names]
    for entry in dst:
        origin = src_by_name.get(entry.name)
        if origin is None:
            lines.append(f"{entry.name}: here, but not in the source")
            continue
        if origin.dtype != entry.dtype:
            lines.append(f"{entry.name}: dtype {origin.dtype} in the source, {entry.dtype} here")
        if origin.shape != entry.shape:
            lines.append(f"{entry.name}: shape {_shape(origin.shape)} in the source, {_shape(entry.shape)} here")
        elif _box(origin) != _box(entry):
            lines.append(f"{entry.name}: {_box(origin)} in the source, {_box(entry)} here")
        elif origin.dtype == entry.dtype and origin.nbytes != entry.nbytes:
            lines.append(f"{entry.name}: {origin.nbytes} bytes in the source, {entry.nbytes} here")
    return lines


def coalesce(ops: Sequence[ReadOp], src_regions: Sequence[Region], dst_regions: Sequence[Region]) -> list[ReadOp]:
    """Joins ops that follow each other on both sides, as far as the registered regions reach. `ops` come by `dst_addr`."""
    src_table, dst_table = _RegionTable(src_regions), _RegionTable(dst_regions)
    joined: list[ReadOp] = []
    src_end = dst_end = 0  # how far the last op may grow
    for op in ops:
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.source, last.src_addr + last.nbytes, last.dst_addr + last.nbytes) == (op.source, op.src_addr, op.dst_addr)
            and op.src_addr + op.nbytes <= src_end
            and op.dst_addr + op.nbytes <= dst_end
        ):
            joined[-1] = ReadOp(last.source, last.src_addr, last.dst_addr, last.nbytes + op.nbytes)
            continue
        joined.append(op)
        src_end, dst_end = src_table.end_of(op.src_addr), dst_table.end_of(op.dst_addr)
    return joined


def check_coverage(ops: Sequence[ReadOp], tensors: Iterable[TensorEntry]) -> None:
    """Proves that the ops (by `dst_addr`) write every byte of the tensors once, and no other; ValueError else."""
    wanted = _merge((entry.addr, entry.addr + entry.nbytes) for entry in tensors if entry.nbytes)
    if _overlapping(ops):
        raise ValueError("the plan writes a byte twice")
    if _merge((op.dst_addr, op.dst_addr + op.nbytes) for op in ops) != wanted:
        raise ValueError("the plan does not write exactly the bytes of the tensors")


def complete_tensors(done: Iterable[Span], tensors: Iterable[TensorEntry]) -> list[str]:
    """The tensors all of whose bytes lie in the spans."""
    written = _merge((span.dst_addr, span.dst_addr + span.nbytes) for span in done)
    starts = [start for start, _ in written]
    complete = []
    for entry in tensors:
        place = bisect.bisect_right(starts, entry.addr) - 1
        if not entry.nbytes or (place >= 0 and entry.addr + entry.nbytes <= written[place][1]):
            complete.append(entry.name)
    return complete


def _overlapping(ops: Sequence[ReadOp]) -> list[ReadOp]:
    """Ops, by `dst_addr`, that begin before the one before has ended."""
    return [op for last, op in itertools.pairwise(ops) if op.dst_addr < last.dst_addr + last.nbytes]


def _merge(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


class _RegionTable:
    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = sorted(regions, key=lambda region: region.addr)
        self._starts = [region.addr for region in self._regions]

    def end_of(self, addr: int) -> int:
        """Where the region that holds `addr` ends; 0 where there is none."""
        place = bisect.bisect_right(self._starts, addr) - 1
        return self._regions[place].end if place >= 0 and addr < self._regions[place].end else 0


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) if shape else "scalar"


def _box(entry: TensorEntry) -> str:
    if entry.opaque:
        return "no statement of what it is part of"
    return f"box at {list(entry.offsets)} of {_shape(entry.global_shape)}"


def _refuse(source: str, problems: Sequence[str]) -> None:
    if problems:
        count = f"{len(problems)} difference{'s' if len(problems) > 1 else ''}"
        raise WeightsMismatch(
            f"the weights of {source} do not match ({count}), nothing was read: {listed(problems)}",
            source=source,
            problems=list(problems),
        )
