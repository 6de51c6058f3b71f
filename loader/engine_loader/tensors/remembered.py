"""Where published tensors lay, without keeping their memory: for a publication that is paused."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from engine_loader.errors import TensorsUnusable, listed
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.shards import is_sharded, shard_of

_REMEDY = "say `replace` with the tensors that there are now"


@dataclass(frozen=True)
class _View:
    """A tensor as a view of a storage, which others may have given up."""

    storage: StorageWeakRef
    dtype: torch.dtype
    device: torch.device
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def tensor(self) -> torch.Tensor | None:
        # None where the storage is gone; else it is kept from here on
        storage: Any = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            return None
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        return empty.set_(storage, self.offset, self.shape, self.strides)


class RememberedTensors:
    """The tensors of a Destination, which may be given up from now on."""

    @plain_torch()
    def __init__(self, weights: Destination) -> None:
        self._manifest = weights.manifest
        self._tensors = {name: weakref.ref(tensor) for name, tensor in weights.items()}
        self._views = {name: _view_of(part) for name, part in weights.parts.items()}

    @plain_torch()
    def recall(self) -> Destination:
        """The same tensors, where they have the same memory; one that nobody has kept but whose
        memory is there, as a view of that.

        TensorsUnusable names those of which that is not so.
        """
        tensors, shards, gone = {}, {}, []
        for entry in self._manifest.tensors:
            tensor = self._tensors[entry.name]()
            if tensor is None:
                tensor = self._views[entry.name].tensor()
            if tensor is None:
                gone.append(f"{entry.name}: nobody has kept it")
                continue
            tensors[entry.name] = tensor
            if not entry.opaque and not is_sharded(tensor):
                shards[entry.name] = shard_of(entry)
        if gone:
            raise TensorsUnusable(
                f"{len(gone)} of {len(self._manifest.tensors)} tensors are gone: {listed(gone)}",
                _REMEDY,
                problems=gone,
            )
        weights = Destination(tensors, shards)
        before = {entry.name: entry for entry in self._manifest.tensors}
        moved = [entry.name for entry in weights.manifest.tensors if entry != before[entry.name]]
        if moved:
            raise TensorsUnusable(
                f"{len(moved)} tensors have other memory than before the pause: {listed(moved)}",
                _REMEDY,
                problems=moved,
            )
        return weights


def _view_of(part: torch.Tensor) -> _View:
    return _View(
        StorageWeakRef(part.untyped_storage()),
        part.dtype,
        part.device,
        int(part.storage_offset()),
        tuple(part.shape),
        tuple(part.stride()),
    )
