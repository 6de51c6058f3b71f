"""The metadata of a distributed checkpoint, from what ranks hold. Used by `EngineReader`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from engine_loader.planning.boxes import Box
from engine_loader.planning.placed import boxes_of
from engine_loader.sources.holdings import Holdings
from engine_loader.tensors.dtypes import dtype_named
from engine_registry import TensorEntry


class UnknownMetadata(Metadata):
    """Stands for metadata that could not be read. Torch would log an error of `read_metadata` with
    its traceback as if nothing had happened, and raise another one without its type.
    """

    def __init__(self, why: Exception) -> None:
        self._why = why

    @property
    def state_dict_metadata(self) -> dict[str, STORAGE_TYPES]:  # type: ignore[override]
        raise self._why


def metadata_of(holdings: Holdings) -> Metadata:
    """All tensors and values of the holdings, by name."""
    described: dict[str, STORAGE_TYPES] = {name: BytesStorageMetadata() for name in holdings.values}
    described.update({name: _storage_of(entries) for name, entries in holdings.tensors.items()})
    return Metadata(described)


def _storage_of(entries: Sequence[TensorEntry]) -> TensorStorageMetadata:
    """Tensors without a box are what they are on the first rank that has them. What no rank holds
    is listed as if one did: planners would leave it out without a word, `load` says that it is
    missing.
    """
    first = entries[0]
    some = [first] if first.opaque else [entry for entry in entries if not entry.opaque]
    boxes = dict.fromkeys(
        box for entry in some if entry.global_shape == first.global_shape for box in boxes_of(entry)
    )
    missing = [Box((0,) * len(first.global_shape), first.global_shape)]
    for box in boxes:
        missing = [rest for part in missing for rest in part.minus(box)]
    boxes.update(dict.fromkeys(missing))
    chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.shape)) for box in boxes]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype_named(first.dtype)), torch.Size(first.global_shape), chunks
    )
