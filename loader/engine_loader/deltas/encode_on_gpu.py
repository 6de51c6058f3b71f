"""Writes the sections of a delta of tensors on one GPU: four launches for each size of an element,
of some hundred MB of tensors at a time. The host plans where all lies, and computes digests.

Called by `deltas.encode`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from engine_loader.deltas.format import (
    BLOCK,
    BYTES,
    DENSE,
    GAPS,
    HEADER_NBYTES,
    SAME,
    SHORTS,
    DoesNotFit,
    Section,
    block_length,
)
from engine_loader.deltas.on_gpu import Numbers, digests_of, on_device, on_one_gpu
from engine_loader.deltas.pairs import Pair
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_AT_ONCE = 1 << 27  # elements; the places of those that have changed take 256 MiB at most
_ALSO = 1 << 12  # as many as the last tile of a block may take besides
_WIDTHS = np.array([0, GAPS[BYTES].itemsize, GAPS[SHORTS].itemsize, 0])  # of the gaps of each kind


def sections_by_kernel(pairs: Sequence[Pair], buffer: torch.Tensor) -> list[Section] | None:
    """Writes them behind the header's place. None where that is not for a kernel: the tensors and
    the buffer lie elsewhere, or there is no Triton.

    DoesNotFit where the buffer is too short.
    """
    tensors = [buffer, *(side for pair in pairs for side in (pair.before, pair.after))]
    if not on_one_gpu(tensors) or buffer.data_ptr() % 8:
        return None
    if any(side.data_ptr() % side.itemsize for side in tensors):
        return None
    try:
        from engine_loader.deltas import encode_kernel

        with on_device(buffer.device):
            return _sections(pairs, buffer, encode_kernel)
    except DoesNotFit:
        raise
    except Exception as exc:  # noqa: BLE001  Triton has no common base of its errors, and needs a compiler at run time
        log.info(
            "the delta takes longer, as its kernel cannot be had: %s",
            exc,
            extra=fields("no_kernel", error=exc),
        )
        return None


def _sections(pairs: Sequence[Pair], buffer: torch.Tensor, kernel: ModuleType) -> list[Section]:
    blocks = _blocks_of(pairs)
    plan = _Plan(pairs, blocks, buffer)
    for some in _groups_of(blocks.rows[:, 2]):
        rows, itemsizes = blocks.rows[some], blocks.itemsizes[some]
        here = {size: itemsizes == size for size in np.unique(itemsizes).tolist()}
        looked = {size: kernel.look(rows[at], size, buffer.device) for size, at in here.items()}
        sums = np.empty((len(rows), 3), np.int64)
        for size, at in here.items():
            sums[at] = looked[size].sums.cpu().numpy()
        contents = plan.contents_of(some, sums)
        for size, at in here.items():
            kernel.write(looked[size], contents[at], size)
    sections = plan.write_tables()
    digests = digests_of(buffer, [(section.offset, section.nbytes) for section in sections])
    return [
        replace(section, digest=digest)
        for section, (digest, _) in zip(sections, digests, strict=True)
    ]


def _groups_of(elements: Numbers) -> Iterator[slice]:
    """Of blocks, which have so many elements each."""
    ends = (elements + _ALSO).cumsum() // _AT_ONCE
    cuts = [0, *(np.diff(ends).nonzero()[0] + 1).tolist(), len(elements)]
    for first, last in pairwise(cuts):
        if first < last:
            yield slice(first, last)


class _Blocks(NamedTuple):
    """Of several tensors, one behind the other.

    Attributes:
        whose: The number of its tensor, of each block.
        numbers: Its own number in the tensor.
        itemsizes: Of its elements.
        rows: As `encode_kernel.look` has them.
    """

    whose: Numbers
    numbers: Numbers
    itemsizes: Numbers
    rows: Numbers


def _blocks_of(pairs: Sequence[Pair]) -> _Blocks:
    facts = np.array(
        [
            (
                pair.length,
                pair.after.itemsize,
                block_length(pair.after.itemsize),
                pair.after.numel(),
                pair.before.data_ptr(),
                pair.after.data_ptr(),
            )
            for pair in pairs
        ],
        np.int64,
    ).reshape(len(pairs), 6)
    lengths = facts[:, 0]
    whose = np.repeat(np.arange(len(pairs)), lengths)
    _, itemsizes, step, elements, before, after = facts[whose].T
    numbers = np.arange(len(whose)) - (lengths.cumsum() - lengths)[whose]
    first = numbers * step
    rows = [
        before + first * itemsizes,
        after + first * itemsizes,
        (elements - first).clip(max=step),
    ]
    return _Blocks(whose, numbers, itemsizes, np.column_stack(rows))


class _Plan:
    """Where the contents of blocks lie in the buffer. They are asked for in the blocks' order."""

    def __init__(self, pairs: Sequence[Pair], blocks: _Blocks, buffer: torch.Tensor) -> None:
        self._pairs = pairs
        self._blocks = blocks
        self._buffer = buffer
        self._stated: list[Numbers] = []
        self._starts = np.zeros(len(pairs), np.int64)  # of the section that each tensor may have
        self._ends = np.zeros(len(pairs), np.int64)  # as they begin where nothing has changed
        self._end = HEADER_NBYTES  # of what is written
        self._at = 0  # where the next contents of the present tensor go

    def contents_of(self, some: slice, sums: Numbers) -> Numbers:
        """As `encode_kernel.write` needs them, by what `encode_kernel.look` has found.

        DoesNotFit where the buffer is too short.
        """
        whose, numbers, itemsizes, rows = (each[some] for each in self._blocks)
        kinds, listed = _chosen(itemsizes, rows[:, 2], sums)
        self._stated.append(listed | kinds << 32)  # as BLOCK has them
        gaps, values = listed * _WIDTHS[kinds], listed * itemsizes
        sizes = _padded(gaps) + _padded(values)
        at = np.empty_like(sizes)
        tensors, firsts, counts = np.unique(whose, return_index=True, return_counts=True)
        for tensor, first, count in np.column_stack([tensors, firsts, counts]).tolist():
            here = slice(first, first + count)
            if numbers[first] == 0:
                self._starts[tensor] = self._end
                self._at = self._end + BLOCK.itemsize * self._pairs[tensor].length
            at[here] = self._at + sizes[here].cumsum() - sizes[here]
            if nbytes := int(sizes[here].sum()):
                self._at += nbytes
                self._end = self._at
            self._ends[tensor] = self._end
        if self._end > self._buffer.numel():
            raise DoesNotFit
        at += self._buffer.data_ptr()
        values_at = at + _padded(gaps)
        return np.column_stack([kinds, at, values_at, at + gaps, values_at + values])

    def write_tables(self) -> list[Section]:
        """Those of all sections, whose digests are yet to be computed."""
        sections = [
            Section(pair.number, pair.after.itemsize, start, end - start, pair.after.numel(), b"")
            for pair, start, end in zip(
                self._pairs, self._starts.tolist(), self._ends.tolist(), strict=True
            )
            if end > start
        ]
        if sections:
            whose, numbers, _, _ = self._blocks
            changed = (self._ends > self._starts)[whose]
            places = self._starts[whose] // BLOCK.itemsize + numbers
            words = self._buffer[: self._end].view(torch.int64)
            at, stated = (
                torch.from_numpy(each[changed]).to(words.device)
                for each in (places, np.concatenate(self._stated))
            )
            words[at] = stated
        return sections


def _chosen(itemsizes: Numbers, elements: Numbers, sums: Numbers) -> tuple[Numbers, Numbers]:
    """The kind of each block, and how many elements it lists."""
    differ, as_bytes, as_shorts = sums.T
    counts = np.stack([np.zeros_like(elements), as_bytes, as_shorts, elements])  # of each kind
    # as `blocks` chooses: the first one of the shortest
    kinds = BYTES + (counts * (_WIDTHS[:, np.newaxis] + itemsizes))[BYTES:].argmin(axis=0)
    kinds[differ * (1 + itemsizes) >= elements * itemsizes] = DENSE
    kinds[differ == 0] = SAME
    return kinds, counts[kinds, np.arange(len(kinds))]


def _padded(nbytes: Numbers) -> Numbers:
    return -(-nbytes // 8) * 8
