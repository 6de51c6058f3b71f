"""Opens memory that another process has left with its keeper, or shares with this one, so that
tensors can lie in it. Starts no thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Protocol

import torch

from engine_loader.errors import EngineFailed
from engine_loader.sharing.pieces import Pieces
from engine_loader.tensors import cuda_memory
from engine_loader.tensors.cuda import uuid_of
from engine_loader.tensors.gpu_memory import OpenedGpuMemory
from engine_loader.tensors.host_memory import HostMemory, ReadOnlyMemory
from engine_registry.schema.manifest import Export, Region


class Opened(Protocol):
    """Memory with tensors that keep it. It is given back with the last reference to it."""

    region: Region

    def tensor(self, start: int, nbytes: int) -> torch.Tensor:
        """Some of its bytes."""


def open_export(export: Export, gpus: Sequence[int], shared: bool) -> Opened:
    """The memory of an export by descriptors; EngineFailed where it cannot be had.

    It lies on the host, or on one of `gpus`, if these are known. `shared`: its process still uses
    it, so it cannot be written to here.
    """
    pieces = Pieces.decode(export)
    with closing(pieces.opened()) as opened:
        memory: OpenedGpuMemory | None = None
        for piece in opened:
            if pieces.on_host:  # the only one
                on_host = ReadOnlyMemory if shared else HostMemory.adopted
                return on_host(piece.fd, piece.nbytes)
            if memory is None:
                memory = OpenedGpuMemory(_gpu_of(piece.fd, gpus), export.nbytes)
            memory.add(piece.fd, piece.nbytes)
    if memory is None:
        raise EngineFailed("an export has no memory")
    memory.ready(shared)
    return memory


def gpus_named(uuids: Sequence[str]) -> list[int]:
    """Their numbers in this process; EngineFailed names one that it does not see."""
    if not uuids:
        return []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = {uuid_of(gpu): gpu for gpu in range(count)}
    if missing := [uuid for uuid in uuids if uuid not in here]:
        raise EngineFailed(
            f"{missing[0]} is none of the {count} GPUs of this process",
            "let it see the same GPUs (CUDA_VISIBLE_DEVICES)",
        )
    return [here[uuid] for uuid in uuids]


def _gpu_of(fd: int, gpus: Sequence[int]) -> int:
    if len(gpus) == 1:
        return gpus[0]
    if not torch.cuda.is_available():
        raise EngineFailed("the memory is that of a GPU, and no GPU of CUDA can be used here")
    return cuda_memory.gpu_of_descriptor(fd, torch.cuda.current_device())
