"""The blocks of a section of a delta, as its table states them. Pure.

The bytes may be anything: what is stated has been found to fit the tensor and the section.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from engine_loader.deltas.format import (
    BLOCK,
    DENSE,
    GAPS,
    SAME,
    Section,
    block_length,
    check_fits,
    padded,
)
from engine_loader.errors import DeltaDamaged
from engine_registry.schema.manifest import TensorEntry


class Change(NamedTuple):
    """A section of a delta, the source's entry of its tensor, and our tensor with its entry."""

    section: Section
    src: TensorEntry
    tensor: torch.Tensor
    dst: TensorEntry


@dataclass(frozen=True)
class Stated:
    """A block of the elements from `first` to `end`, of which so many are listed."""

    kind: int
    count: int
    first: int
    end: int
    gaps_at: int
    values_at: int

    @property
    def gaps_nbytes(self) -> int:
        return _gaps_nbytes(self.kind, self.count)


def _gaps_nbytes(kind: int, count: int) -> int:
    return count * GAPS[kind].itemsize if kind in GAPS else 0


def table_nbytes(section: Section, src: TensorEntry) -> int:
    """Of the table that the section begins with. DeltaDamaged where it cannot be one of this
    tensor.
    """
    check_fits(section, src)
    nbytes = BLOCK.itemsize * -(-section.elements // block_length(section.itemsize))
    if nbytes > section.nbytes:
        raise DeltaDamaged(f"{src.name}: its changes are cut short")
    return nbytes


def check_nbytes(came: int, section: Section, src: TensorEntry) -> None:
    """DeltaDamaged unless all bytes of the section came."""
    if came != section.nbytes:
        raise DeltaDamaged(f"{src.name}: {came} bytes came of {section.nbytes}")


def check_digest(digest: bytes, section: Section, src: TensorEntry) -> None:
    """DeltaDamaged unless it is the section's."""
    if digest != section.digest:
        raise DeltaDamaged(f"{src.name}: its changes differ from their digest")


def stated(table: bytes, section: Section, src: TensorEntry) -> Iterator[Stated]:
    """The blocks in which something changed, by the table of `table_nbytes` bytes.

    All is in the section only if the last one is followed by the end, and not by DeltaDamaged.
    """
    step = block_length(section.itemsize)
    starts = range(0, section.elements, step)
    at = len(table)
    for first, (count, kind, _) in zip(starts, np.frombuffer(table, BLOCK).tolist(), strict=True):
        end = min(first + step, section.elements)
        elements = end - first
        right = {SAME: count == 0, DENSE: count == elements}.get(kind, 0 < count <= elements)
        if kind not in (SAME, *GAPS, DENSE) or not right:
            raise DeltaDamaged(
                f"{src.name}: a block of {elements} elements has kind {kind} and lists {count}"
            )
        values_at = at + padded(_gaps_nbytes(kind, count))
        if kind != SAME:
            yield Stated(kind, count, first, end, at, values_at)
        at = values_at + padded(count * section.itemsize)
    if at != section.nbytes:
        raise DeltaDamaged(f"{src.name}: its changes have {section.nbytes} bytes, and need {at}")


def check_gaps(block: Stated, total: int, zeros: int, src: TensorEntry) -> None:
    """By the sum of its gaps, and how many of them are 0 behind the first one: DeltaDamaged where
    an element would lie outside of the block, or where another does.
    """
    if total >= block.end - block.first or zeros:
        raise DeltaDamaged(f"{src.name}: changes lie outside of it, or two at one place")
