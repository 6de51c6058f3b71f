"""Which blocks of the bytes that a plan brings have digests at a source. So blocks that are here
already need not come. Pure.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from engine_loader.planning.reads import Span
from engine_registry.schema.manifest import Manifest


class Block(NamedTuple):
    """Bytes of our memory, and the place in a source's table of the digest that they have once
    they have come; or bytes of the source itself, where that is said.
    """

    slot: int
    addr: int
    nbytes: int


class _Digested(NamedTuple):
    """A tensor of a source, block by block."""

    addr: int
    nbytes: int
    slots: range
    block_nbytes: int


class DigestedMemory:
    """The memory of a source, as far as its table has digests of it."""

    def __init__(self, manifest: Manifest) -> None:
        self._tensors: list[_Digested] = []
        table = manifest.digests
        if table is None:
            return
        slots = table.slots({entry.name: entry.nbytes for entry in manifest.tensors})
        end = 0
        # Of tensors that share memory the one that holds the others is enough.
        for entry in sorted(manifest.tensors, key=lambda entry: (entry.addr, -entry.nbytes)):
            if entry.nbytes and entry.addr >= end:
                block_nbytes = table.block_nbytes if table.blocks_of(entry.nbytes) else entry.nbytes
                self._tensors.append(
                    _Digested(entry.addr, entry.nbytes, slots[entry.name], block_nbytes)
                )
                end = entry.addr + entry.nbytes
        self._starts = [tensor.addr for tensor in self._tensors]

    def each(self) -> Iterator[tuple[int, Block]]:
        """All blocks, where they lie there, each with the number of its tensor."""
        for number, (addr, size, slots, step) in enumerate(self._tensors):
            for place, slot in enumerate(slots):
                ahead = place * step
                yield number, Block(slot, addr + ahead, min(step, size - ahead))

    def blocks(self, src_addr: int, dst_addr: int, nbytes: int) -> Iterator[Block]:
        """All that lie in these bytes, which come to `dst_addr`, with their first and last byte."""
        end = src_addr + nbytes
        place = max(0, bisect.bisect_right(self._starts, src_addr) - 1) if self._tensors else 0
        while place < len(self._tensors) and self._starts[place] < end:
            addr, size, slots, step = self._tensors[place]
            first = max(0, -(-(src_addr - addr) // step))
            last = len(slots) if addr + size <= end else (end - addr) // step
            for number in range(first, last):
                ahead = number * step
                yield Block(
                    slots[number], dst_addr + addr + ahead - src_addr, min(step, size - ahead)
                )
            place += 1


def blocks_of(
    spans: Iterable[Span], memories: Mapping[int, DigestedMemory]
) -> dict[int, list[Block]]:
    """By the number of the source, of those that have digests: what can be compared of the spans.

    Of bytes that several of them hold, the first one is asked. Runs at equal distances have no
    blocks.
    """
    found: defaultdict[int, list[Block]] = defaultdict(list)
    for span in spans:
        for number, addr in span.srcs:
            if number in memories:
                for src_addr, dst_addr, nbytes in _runs(span, addr):
                    found[number] += memories[number].blocks(src_addr, dst_addr, nbytes)
                break
    return found


def _runs(span: Span, addr: int) -> Iterator[tuple[int, int, int]]:
    """From where at the source to where here, and how long."""
    if not span.lines:
        yield addr, span.dst_addr, span.nbytes
    for some in span.lines:
        if not some.counts:
            yield addr + some.src, some.dst, some.nbytes
