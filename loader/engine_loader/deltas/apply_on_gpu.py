"""Applies a delta that lies on a GPU to tensors there: three launches for each size of an element
and number of dimensions, of a few GiB of tensors at a time. The host proves the bytes before.

Called by `deltas.apply`.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from engine_loader.deltas.on_gpu import digests_of, on_device, on_one_gpu
from engine_loader.deltas.places import Way, same_places, ways
from engine_loader.deltas.stated import (
    Change,
    Stated,
    check_digest,
    check_gaps,
    check_nbytes,
    stated,
    table_nbytes,
)
from engine_loader.errors import DeltaDamaged
from engine_registry.schema.manifest import TensorEntry
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_AT_ONCE_NBYTES = 4 << 30  # of tensors; what is noted of their parts takes 2 % of it at most
_Proven = tuple[Change, list[Stated]]


def apply_by_kernel(data: torch.Tensor, changes: Sequence[Change]) -> bool:
    """As `deltas.apply.apply_all`, of tensors that have been checked. False where that is not for a
    kernel: the tensors and the delta lie elsewhere, or there is no Triton.

    DeltaDamaged as there. The GPU may go on with the work after this returns.
    """
    if not on_one_gpu([data, *(each.tensor for each in changes)]) or data.data_ptr() % 8:
        return False
    if any(
        each.section.offset % 8 or each.tensor.data_ptr() % min(8, each.tensor.itemsize)
        for each in changes
    ):
        return False
    try:
        from engine_loader.deltas import apply_kernel

        with on_device(data.device):
            blocks = list(zip(changes, _proven(data, changes), strict=True))
            for group in _groups_of(blocks):
                _apply(data, group, apply_kernel)
    except DeltaDamaged:
        raise
    except Exception as exc:  # noqa: BLE001  Triton has no common base of its errors, and needs a compiler at run time
        log.info(
            "the delta takes longer, as its kernel cannot be had: %s",
            exc,
            extra=fields("no_kernel", error=exc),
        )
        return False
    return True


def _proven(data: torch.Tensor, changes: Sequence[Change]) -> list[list[Stated]]:
    """The blocks of each in which something changed. Their gaps are yet to be proven."""
    sections = {each.section.offset: each for each in changes}  # which several names may share
    order = sorted(sections)
    spans, kept = [], []
    for section, src, _, _ in map(sections.__getitem__, order):
        kept.append(table_nbytes(section, src))
        spans.append((section.offset, section.nbytes))
        check_nbytes(min(section.nbytes, data.numel() - section.offset), section, src)
    found = dict(zip(order, digests_of(data, spans, kept), strict=True))
    blocks = []
    for section, src, _, _ in changes:
        digest, table = found[section.offset]
        check_digest(digest, section, src)
        blocks.append(list(stated(table, section, src)))
    return blocks


def _groups_of(some: Sequence[_Proven]) -> Iterator[Sequence[_Proven]]:
    ends = np.cumsum([change.src.nbytes for change, _ in some]) // _AT_ONCE_NBYTES
    for first, last in pairwise([0, *(np.diff(ends).nonzero()[0] + 1).tolist(), len(some)]):
        yield some[first:last]


class _Rows(NamedTuple):
    """Of blocks whose elements have one size, and which go to tensors of so many dimensions."""

    owners: list[tuple[Stated, TensorEntry]]
    blocks: list[tuple[int, ...]]  # as `apply_kernel.measure` has them
    more: list[tuple[int, ...]]  # as `apply_kernel.place` has them; with the numbers of tables


def _apply(data: torch.Tensor, group: Sequence[_Proven], kernel: ModuleType) -> None:
    """Nothing is written before all gaps of the group are proven."""
    kinds: defaultdict[tuple[int, int], _Rows] = defaultdict(lambda: _Rows([], [], []))
    tables: list[torch.Tensor] = []
    for change, blocks in group:
        start = data.data_ptr() + change.section.offset
        itemsize = change.section.itemsize
        for way in _ways(change):
            inner = [  # the innermost first
                number
                for at in reversed(range(len(way.sizes)))
                for number in (way.sizes[at], len(tables) + at)
            ]
            tables += way.tables
            for block in blocks:
                if way.start < block.end and block.first < way.stop:
                    rows = kinds[itemsize, len(way.sizes)]
                    rows.owners.append((block, change.src))
                    rows.blocks.append((start + block.gaps_at, block.count, block.kind))
                    rows.more.append(
                        (
                            start + block.values_at,
                            block.end - block.first,
                            block.first,
                            change.tensor.data_ptr(),
                            way.ahead,
                            *inner,
                        )
                    )
    measured = {
        kind: kernel.measure(np.array(rows.blocks, np.int64), data.device)
        for kind, rows in kinds.items()
    }
    for kind, rows in kinds.items():
        ends = measured[kind].ends.tolist()
        for (block, src), (total, zeros) in zip(rows.owners, ends, strict=True):
            check_gaps(block, total, zeros, src)
    lengths = np.array([0, *map(len, tables)], np.int64)
    there = torch.cat(tables).to(data.device) if tables else data
    addresses = there.data_ptr() + 8 * lengths.cumsum()
    for (itemsize, dimensions), rows in kinds.items():
        more = np.array(rows.more, np.int64)
        more[:, 6::2] = addresses[more[:, 6::2]]
        kernel.place(measured[itemsize, dimensions], more, itemsize)


def _ways(change: Change) -> list[Way]:
    """Of tensors with the same places one without dimensions."""
    section, src, _, dst = change
    if same_places(src, dst):
        return [Way((), (), 0, 0, section.elements)]
    return ways(src, dst, section.elements // prod(src.shape), _CPU)
