"""Memory of a GPU that other processes can map by a descriptor, with tensors. No thread starts."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress

import torch

from engine_loader.errors import EngineFailed
from engine_loader.tensors import cuda_memory
from engine_loader.tensors.cuda_memory import Mapping, on_gpu


class GpuMemory:
    """Memory of a GPU with tensors that keep it. It is freed with the last reference to it."""

    def __init__(self, gpu: int, nbytes: int, piece_nbytes: int | None = None) -> None:
        """So many bytes or some more, in pieces that are taken when they are needed if
        `piece_nbytes` says how long they are. EngineFailed where there is not so much memory.
        """
        self._gpu = gpu
        with on_gpu(gpu):
            unit = cuda_memory.granularity(gpu)
            nbytes = -(-nbytes // unit) * unit
            self._piece_nbytes = min(nbytes, -(-(piece_nbytes or nbytes) // unit) * unit)
            self._mapping = Mapping(gpu, nbytes)
        self.region = self._mapping.region
        weakref.finalize(self, _free, self._mapping, gpu, os.getpid()).atexit = False
        self.have(1)

    def have(self, nbytes: int) -> None:
        """The first so many bytes can be used from now on; EngineFailed."""
        with on_gpu(self._gpu):
            while self._mapping.nbytes < nbytes:
                if self._mapping.nbytes:
                    torch.cuda.empty_cache()  # of tensors that were moved
                rest = self.region.nbytes - self._mapping.nbytes
                piece_nbytes = min(self._piece_nbytes, rest)
                handle = cuda_memory.create(self._gpu, piece_nbytes)
                try:
                    self._mapping.add(handle, piece_nbytes)
                finally:
                    cuda_memory.release(handle)
                self._mapping.allow()
                for other in range(torch.cuda.device_count()):
                    if other != self._gpu and torch.cuda.can_device_access_peer(other, self._gpu):
                        self._mapping.allow(other)

    def descriptor(self) -> int:
        """A new one, which the caller closes; EngineFailed where it has several pieces."""
        if self._piece_nbytes < self.region.nbytes:
            raise EngineFailed("memory that was made of pieces has no single descriptor")
        with on_gpu(self._gpu):
            handle = cuda_memory.retain(self.region.addr)
            try:
                return cuda_memory.to_descriptor(handle)
            finally:
                cuda_memory.release(handle)

    def tensor(self, start: int, nbytes: int) -> torch.Tensor:
        """Some of its bytes."""
        device = torch.device("cuda", self._gpu)
        return torch.as_tensor(_Bytes(self, self.region.addr + start, nbytes), device=device)


class _Bytes:
    """Of memory, for torch, which keeps this object."""

    def __init__(self, memory: GpuMemory, addr: int, nbytes: int) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (addr, False),
            "strides": None,
            "version": 3,
        }


def _free(mapping: Mapping, gpu: int, pid: int) -> None:
    """When nothing refers to its tensors any more, though the GPU may still work on them."""
    if os.getpid() != pid:  # a forked child's copy, which has no CUDA
        return
    with suppress(EngineFailed), on_gpu(gpu):  # of a GPU that has failed nothing can be freed
        cuda_memory.calls().cuCtxSynchronize()
        mapping.close()
