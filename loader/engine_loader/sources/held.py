"""What of the wanted bytes the tensors hold already, as the sources' tables of digests say. Used by
`loading.attempt`.

Our own digests are always computed of the bytes as they are now, and never remembered. So it does
not matter what has been done to the tensors since they were filled.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch

from engine_loader.digests.parts import digests_of_parts
from engine_loader.digests.table import NBYTES, DigestCell, digests_of
from engine_loader.engines.base import Engine, lend
from engine_loader.errors import Cancelled, DigestsMissing
from engine_loader.planning.held import Block, DigestedMemory, blocks_of
from engine_loader.planning.placed import boxes_of
from engine_loader.planning.reads import Span
from engine_loader.sources.own_memory import OwnMemory
from engine_loader.sources.pieces import part_of
from engine_loader.sources.proofs import Piece, described, proves
from engine_loader.sources.source import SourceRank
from engine_loader.tensors.cuda import to_register
from engine_loader.tensors.modes import plain_torch
from engine_registry.schema.manifest import DigestTable, Manifest, TensorEntry


class Held(NamedTuple):
    """Bytes that are there, and the numbers of the sources whose tables it takes to say so."""

    spans: list[Span]
    numbers: frozenset[int]


@dataclass
class _Table:
    """What is said of all these sources in common."""

    numbers: list[int]
    manifest: Manifest
    cell: DigestCell
    brought_by: set[int] = field(default_factory=set)
    packed: bytes = b""

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

    def digest(self, slot: int) -> bytes:
        return self.packed[NBYTES * slot : NBYTES * (slot + 1)]


class HeldBytes:
    """Of one attempt: `lend`, read the `spans`, which bring the tables, then `find`.

    Where no source has digests there are no spans. A table also holds for sources without digests
    that have the same tensors of the same content.
    """

    def __init__(self, sources: Sequence[SourceRank], device: torch.device) -> None:
        self._sources = sources
        self._device = device
        self._memories: dict[int, DigestedMemory] = {}
        self._tables: list[_Table] = []
        self.spans: list[Span] = []
        for holders, numbers in _alike(sources):
            manifest, table = sources[holders[0][0]].manifest, holders[0][1]
            names = [entry.name for entry in manifest.tensors]
            sizes = [entry.nbytes for entry in manifest.tensors]
            cell = DigestCell(names, device, table.algorithm, table.block_nbytes, sizes)
            self._tables.append(_Table(numbers, manifest, cell))
            for number in numbers:
                digested = replace(sources[number].manifest, digests=table)
                self._memories[number] = DigestedMemory(digested)
            srcs = tuple([(number, own.addr) for number, own in holders])
            self.spans.append(Span(cell.region.addr, cell.region.nbytes, srcs))

    def lend(self, engine: Engine, undo: ExitStack) -> None:
        """Until `undo` is closed, the engine may read tables."""
        for table in self._tables:
            region = to_register(table.cell.region, self._device.type)
            lend(engine, undo, region, owner=table.cell)

    def receive(self, number: int, spans: Sequence[Span]) -> None:
        """They have come from that source, and are of its content."""
        for table, whole in zip(self._tables, self.spans, strict=True):
            end = whole.dst_addr + whole.nbytes
            if any(whole.dst_addr <= span.dst_addr < end for span in spans):
                table.brought_by.add(number)

    @plain_torch()
    def find(
        self,
        spans: Sequence[Span],
        dst: Manifest,
        tensors: Mapping[str, torch.Tensor],
        cancel: threading.Event,
    ) -> list[Held]:
        """What of the spans the tensors of `dst` hold already, once all tables have come.

        Raises Cancelled.
        """
        memory = OwnMemory(dst, tensors)
        for table in self._tables:
            table.packed = table.cell.packed()
        blocks = blocks_of(spans, self._memories)
        found = []
        for table in self._tables:
            some = [block for number in table.numbers for block in blocks.get(number, ())]
            found.append(_equal_blocks(table, some, memory, cancel))
        for entry in memory.strided(spans):
            _check(cancel)
            found.append(self._equal_tensor(entry, tensors[entry.name]))
        return [held for held in found if held.spans]

    def _equal_tensor(self, entry: TensorEntry, tensor: torch.Tensor) -> Held:
        """All of one whose pieces do not lie in a row here, or nothing, as its bytes count only
        once all of them are there.
        """
        left = boxes_of(entry)
        pieces: list[tuple[_Table, Piece]] = []
        for table in self._tables:
            offer = table.entries.get(entry.name)
            if left and offer is not None and proves(offer, entry):
                pieces.append((table, offer))
                for box in boxes_of(offer):
                    left = [rest for part in left for rest in part.minus(box)]
        if left:
            return _NOTHING
        for table, piece in pieces:
            part = part_of(tensor, entry.along, piece)
            if digests_of({0: part}, table.algorithm)[0] != table.digest(table.places[entry.name]):
                return _NOTHING
        whole = Span(entry.addr, entry.nbytes, ())
        return Held([whole], frozenset().union(*[table.brought_by for table, _ in pieces]))


_NOTHING = Held([], frozenset())


def _equal_blocks(
    table: _Table, blocks: Sequence[Block], memory: OwnMemory, cancel: threading.Event
) -> Held:
    some = [
        (block, part)
        for block in blocks
        if (part := memory.part(block.dst_addr, block.nbytes)) is not None
    ]
    spans: list[Span] = []
    with closing(digests_of_parts([part for _, part in some], table.algorithm)) as digests:
        for (block, part), digest in zip(some, digests, strict=True):
            _check(cancel)
            if digest != table.digest(block.slot):
                continue
            last = spans[-1] if spans else None
            # no span leaves its tensor, as the next one may lie in another region
            if last is not None and part.start and last.dst_addr + last.nbytes == block.dst_addr:
                spans[-1] = last._replace(nbytes=last.nbytes + block.nbytes)
            else:
                spans.append(Span(block.dst_addr, block.nbytes, ()))
    return Held(spans, frozenset(table.brought_by))


def _check(cancel: threading.Event) -> None:
    if cancel.is_set():
        raise Cancelled("the load was cancelled")


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
