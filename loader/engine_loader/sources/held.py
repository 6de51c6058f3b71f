"""What of the wanted bytes the tensors hold already, as the sources' tables of digests say. Used by
`loading.attempt`.

Our own digests are always computed of the bytes as they are now, and never remembered. So it does
not matter what has been done to the tensors since they were filled.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

import torch

from engine_loader.digests.parts import digests_of_parts
from engine_loader.digests.table import digests_of
from engine_loader.errors import Cancelled
from engine_loader.planning.held import Block, blocks_of
from engine_loader.planning.placed import boxes_of
from engine_loader.planning.reads import Span
from engine_loader.sources.own_memory import OwnMemory
from engine_loader.sources.pieces import part_of
from engine_loader.sources.proofs import Piece, proves
from engine_loader.sources.tables import Table, Tables
from engine_loader.tensors.modes import plain_torch
from engine_registry.schema.manifest import Manifest, TensorEntry


class Held(NamedTuple):
    """Bytes that are there, and the numbers of the sources whose tables it takes to say so."""

    spans: list[Span]
    numbers: frozenset[int]


@plain_torch()
def find_held(
    tables: Tables,
    spans: Sequence[Span],
    dst: Manifest,
    tensors: Mapping[str, torch.Tensor],
    cancel: threading.Event,
) -> list[Held]:
    """What of the spans the tensors of `dst` hold already, once all tables have come.

    Raises Cancelled.
    """
    memory = OwnMemory(dst, tensors)
    blocks = blocks_of(spans, tables.memories)
    found = []
    for table in tables.each:
        some = [block for number in table.numbers for block in blocks.get(number, ())]
        found.append(_equal_blocks(table, some, memory, cancel))
    for entry in memory.strided(spans):
        _check(cancel)
        found.append(_equal_tensor(tables, entry, tensors[entry.name]))
    return [held for held in found if held.spans]


def _equal_tensor(tables: Tables, entry: TensorEntry, tensor: torch.Tensor) -> Held:
    """All of one whose pieces do not lie in a row here, or nothing, as its bytes count only once
    all of them are there.
    """
    left = boxes_of(entry)
    pieces: list[tuple[Table, Piece]] = []
    for table in tables.each:
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
    table: Table, blocks: Sequence[Block], memory: OwnMemory, cancel: threading.Event
) -> Held:
    some = [
        (block, part)
        for block in blocks
        if (part := memory.part(block.addr, block.nbytes)) is not None
    ]
    spans: list[Span] = []
    with closing(digests_of_parts([part for _, part in some], table.algorithm)) as digests:
        for (block, part), digest in zip(some, digests, strict=True):
            _check(cancel)
            if digest != table.digest(block.slot):
                continue
            last = spans[-1] if spans else None
            # no span leaves its tensor, as the next one may lie in another region
            if last is not None and part.start and last.dst_addr + last.nbytes == block.addr:
                spans[-1] = last._replace(nbytes=last.nbytes + block.nbytes)
            else:
                spans.append(Span(block.addr, block.nbytes, ()))
    return Held(spans, frozenset(table.brought_by))


def _check(cancel: threading.Event) -> None:
    if cancel.is_set():
        raise Cancelled("the load was cancelled")
