"""Tables of digests of sources, and the buffers that they are read to. Used where blocks are
compared before they are read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from engine_loader.digests.table import NBYTES, DigestCell
from engine_loader.engines.base import Engine, lend
from engine_loader.errors import DigestsMissing
from engine_loader.planning.held import DigestedMemory
from engine_loader.planning.reads import Span
from engine_loader.sources.proofs import described
from engine_loader.sources.source import SourceRank
from engine_loader.tensors.cuda import to_register
from engine_registry.schema.manifest import DigestTable, Manifest, TensorEntry


@dataclass
class Table:
    """What is said of all these sources in common. `brought_by` are those that it was read from."""

    numbers: list[int]
    manifest: Manifest
    cell: DigestCell
    brought_by: set[int] = field(default_factory=set)

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        return {entry.name: entry for entry in self.manifest.tensors}

    @cached_property
    def places(self) -> dict[str, int]:
        """Of the digests of whole tensors."""
        return {name: place for place, name in enumerate(sorted(self.entries))}

    @property
    def algorithm(self) -> str:
        return self.cell.table.algorithm

    @cached_property
    def packed(self) -> bytes:
        """All of it, once it has come."""
        return self.cell.packed()

    def digest(self, slot: int) -> bytes:
        return self.packed[NBYTES * slot : NBYTES * (slot + 1)]


class Tables:
    """Of one attempt: `lend`, then read the `spans`, which bring the tables.

    Where no source has digests there are no spans. A table also holds for sources without digests
    that have the same tensors of the same content. `memories` are what tables have digests of, by
    the number of the source.
    """

    def __init__(self, sources: Sequence[SourceRank], device: torch.device) -> None:
        self._device = device
        self.memories: dict[int, DigestedMemory] = {}
        self.each: list[Table] = []
        self.spans: list[Span] = []
        for holders, numbers in _alike(sources):
            manifest, table = sources[holders[0][0]].manifest, holders[0][1]
            names = [entry.name for entry in manifest.tensors]
            sizes = [entry.nbytes for entry in manifest.tensors]
            cell = DigestCell(names, device, table.algorithm, table.block_nbytes, sizes)
            self.each.append(Table(numbers, manifest, cell))
            for number in numbers:
                digested = replace(sources[number].manifest, digests=table)
                self.memories[number] = DigestedMemory(digested)
            srcs = tuple([(number, own.addr) for number, own in holders])
            self.spans.append(Span(cell.region.addr, cell.region.nbytes, srcs))

    def lend(self, engine: Engine, undo: ExitStack) -> None:
        """Until `undo` is closed, the engine may read tables."""
        for table in self.each:
            region = to_register(table.cell.region, self._device.type)
            lend(engine, undo, region, owner=table.cell)

    def receive(self, number: int, spans: Sequence[Span]) -> None:
        """They have come from that source, and are of its content."""
        for table, whole in zip(self.each, self.spans, strict=True):
            end = whole.dst_addr + whole.nbytes
            if any(whole.dst_addr <= span.dst_addr < end for span in spans):
                table.brought_by.add(number)


def has_digests(source: SourceRank) -> bool:
    """Of all its tensors, by an algorithm that we know."""
    try:
        return bool(source.algorithm)
    except DigestsMissing:
        return False


_Holders = list[tuple[int, DigestTable]]  # numbers of sources, and where their tables lie


def _alike(sources: Sequence[SourceRank]) -> list[tuple[_Holders, list[int]]]:
    """For each table that there is: who has it, and of whom it holds."""
    alike: defaultdict[object, list[int]] = defaultdict(list)
    for number, source in enumerate(sources):
        kind = (source.record.content, described(source.manifest)) if len(sources) > 1 else None
        alike[kind].append(number)
    found: list[tuple[_Holders, list[int]]] = []
    for numbers in alike.values():
        tables: defaultdict[tuple[str, int], _Holders] = defaultdict(list)
        for number in numbers:
            table = sources[number].manifest.digests
            if table is not None and has_digests(sources[number]):
                tables[table.algorithm, table.block_nbytes].append((number, table))
        silent = set(numbers) - {number for each in tables.values() for number, _ in each}
        for holders in tables.values():
            found.append((holders, [*(number for number, _ in holders), *sorted(silent)]))
            silent.clear()
    return found
