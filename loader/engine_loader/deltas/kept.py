"""A delta as it has come from a source, and how it is put into a buffer for other readers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter

import torch

from engine_loader.deltas.encode import erase
from engine_loader.deltas.format import HEADER_NBYTES, DeltaHeader, first_names
from engine_loader.tensors.cuda import wait_for
from engine_loader.tensors.modes import plain_torch
from engine_registry.schema.manifest import TensorEntry


@dataclass(frozen=True)
class KeptDelta:
    """`data` are all of its bytes, which its header proves. `entries` are all tensors of the
    manifest that it is of.
    """

    header: DeltaHeader
    entries: Sequence[TensorEntry]
    data: torch.Tensor

    def is_of(self, entries: Sequence[TensorEntry]) -> bool:
        """Whether it says of these tensors, which lie elsewhere, what it says of its own: they have
        the same names, and all elements at the same places.
        """
        return _layout(self.entries) == _layout(entries)

    @plain_torch()
    def put(self, buffer: torch.Tensor) -> None:
        """Into a buffer that is long enough: as `encode` does, the header is erased first and
        written last.
        """
        erase(buffer)
        buffer[HEADER_NBYTES : self.header.nbytes].copy_(self.data[HEADER_NBYTES:])
        wait_for([buffer.device])
        buffer[:HEADER_NBYTES].copy_(self.data[:HEADER_NBYTES])
        wait_for([buffer.device])


_DESCRIBED = attrgetter(*[one.name for one in fields(TensorEntry) if one.name != "addr"])


def _layout(entries: Sequence[TensorEntry]) -> object:
    return set(map(_DESCRIBED, entries)), dict(first_names(entries))
