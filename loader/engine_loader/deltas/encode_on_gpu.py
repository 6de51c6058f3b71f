"""Writes the sections of a delta of tensors on one GPU: three launches for each size of an element,
of a few GiB of tensors at a time. The host plans where everything lies, and computes digests.

Called by `deltas.encode`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
from engine_loader.deltas.on_gpu import Numbers, digests_of, groups_of, on_device, on_one_gpu
from engine_loader.deltas.pairs import Pair
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


def sections_by_kernel(pairs: Sequence[Pair], buffer: torch.Tensor) -> list[Section] | None:
    """Writes them behind the header's place. None where that is not for a kernel: the tensors and
    the buffer lie elsewhere, or there is no Triton.

    DoesNotFit where the buffer is too short.
    """
    tensors = [buffer, *(side for pair in pairs for side in (pair.before, pair.after))]
    aligned = buffer.data_ptr() % 8 == 0 and all(
        side.data_ptr() % side.itemsize == 0 for side in tensors
    )
    if not on_one_gpu(tensors) or not aligned:
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
    end = HEADER_NBYTES
    changed: list[tuple[Pair, int, int]] = []  # with where its section begins, and how long it is
    for group in groups_of(pairs, lambda pair: pair.after.nbytes):
        blocks = _blocks_of(group)
        here = {size: blocks.itemsizes == size for size in np.unique(blocks.itemsizes).tolist()}
        looked = {
            size: kernel.look(blocks.rows[rows], size, buffer.device) for size, rows in here.items()
        }
        sums = np.empty((len(blocks.rows), 3), np.int64)
        for size, rows in here.items():
            sums[rows] = looked[size].sums.cpu().numpy()
        sizes, contents = _placed(blocks, sums)
        starts = end + sizes.cumsum() - sizes
        end += int(sizes.sum())
        if end > buffer.numel():
            raise DoesNotFit
        contents[:, 1:6] += (buffer.data_ptr() + starts)[blocks.whose, np.newaxis]
        contents[(sizes == 0)[blocks.whose], 5] = 0
        for size, rows in here.items():
            kernel.write(looked[size], contents[rows], size)
        changed += [
            (pair, start, nbytes)
            for pair, start, nbytes in zip(group, starts.tolist(), sizes.tolist(), strict=True)
            if nbytes
        ]
    digests = digests_of(buffer, [(start, nbytes) for _, start, nbytes in changed])
    return [
        Section(pair.number, pair.after.itemsize, start, nbytes, pair.after.numel(), digest)
        for (pair, start, nbytes), (digest, _) in zip(changed, digests, strict=True)
    ]


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
    )
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


def _placed(blocks: _Blocks, sums: Numbers) -> tuple[Numbers, Numbers]:
    """How many bytes the section of each tensor has, 0 where nothing changed; and what
    `encode_kernel.write` needs of each block, with places in its section instead of addresses.
    """
    differ, as_bytes, as_shorts = sums.T
    itemsizes, elements = blocks.itemsizes, blocks.rows[:, 2]
    counts = np.stack([np.zeros_like(elements), as_bytes, as_shorts, elements])  # of each kind
    widths = np.array([0, GAPS[BYTES].itemsize, GAPS[SHORTS].itemsize, 0])
    # as `blocks` chooses: the first one of the shortest
    kinds = BYTES + (counts * (widths[:, np.newaxis] + itemsizes))[BYTES:].argmin(axis=0)
    kinds[differ * (1 + itemsizes) >= elements * itemsizes] = DENSE
    kinds[differ == 0] = SAME
    listed = counts[kinds, np.arange(len(kinds))]
    gaps, values = listed * widths[kinds], listed * itemsizes
    contents = _padded(gaps) + _padded(values)
    tables = BLOCK.itemsize * np.bincount(blocks.whose)
    firsts = (blocks.numbers == 0).nonzero()[0]
    ahead = contents.cumsum() - contents
    gaps_at = (tables - ahead[firsts])[blocks.whose] + ahead
    values_at = gaps_at + _padded(gaps)
    stated_at = BLOCK.itemsize * blocks.numbers
    stated = listed | kinds << 32  # as BLOCK has them
    sizes = np.add.reduceat(contents, firsts)
    return np.where(sizes, tables + sizes, 0), np.column_stack(
        [kinds, gaps_at, values_at, gaps_at + gaps, values_at + values, stated_at, stated]
    )


def _padded(nbytes: Numbers) -> Numbers:
    return -(-nbytes // 8) * 8
