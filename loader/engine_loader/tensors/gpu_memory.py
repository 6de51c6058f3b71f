"""Memory of a GPU that other processes can map by a descriptor, with tensors. No thread starts."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress

import torch

from engine_loader.errors import EngineFailed
from engine_loader.tensors import cuda_memory
from engine_loader.tensors.cuda_memory import Mapping, on_gpu
from engine_registry.etcd.descriptors import explain
from engine_registry.forks import closed_in_child, prevented
from engine_registry.registration.descriptors import close_all
from engine_registry.schema.manifest import Region


class _Memory:
    """It is freed with the last reference to it; its tensors keep it."""

    _gpu: int
    region: Region

    def tensor(self, start: int, nbytes: int) -> torch.Tensor:
        """Some of its bytes."""
        device = torch.device("cuda", self._gpu)
        return torch.as_tensor(_Bytes(self, self.region.addr + start, nbytes), device=device)


class GpuMemory(_Memory):
    """Memory of a GPU that is made here."""

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
                _allow(self._mapping, self._gpu)

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


class OpenedGpuMemory(_Memory):
    """Memory of a GPU that another process has made. Drivers give no new descriptors of it, so it
    keeps those by which it was opened.
    """

    def __init__(self, gpu: int, nbytes: int) -> None:
        """Reserves addresses for so many bytes; EngineFailed."""
        self._gpu = gpu
        self._fds: dict[int, int] = {}  # by address
        with on_gpu(gpu):
            self._mapping = Mapping(gpu, nbytes)
        self.region = self._mapping.region
        free = weakref.finalize(self, _free, self._mapping, gpu, os.getpid(), self._fds)
        free.atexit = False
        closed_in_child(self, OpenedGpuMemory._close_in_child)

    def _close_in_child(self) -> None:
        """A forked child has no CUDA, and would keep the memory from being freed."""
        close_all(list(self._fds.values()))

    def add(self, fd: int, nbytes: int) -> None:
        """Maps so many bytes behind what is mapped already. The descriptor need not be kept.
        EngineFailed where it is of other memory, or no more descriptors can be had.
        """
        with on_gpu(self._gpu):
            handle = cuda_memory.from_descriptor(fd)
            try:
                at = self.region.addr + self._mapping.nbytes
                self._mapping.add(handle, nbytes)
            finally:
                cuda_memory.release(handle)
        try:
            with prevented():
                self._fds[at] = os.dup(fd)
        except OSError as exc:
            why, remedy = explain(exc)
            raise EngineFailed(f"memory of a GPU cannot be kept: {why}", remedy) from exc

    def ready(self, shared: bool) -> None:
        """Lets the GPU, and those that reach it, use what is mapped; EngineFailed.

        If it is `shared`, they can only read it. Else this process may hand it on.
        """
        with on_gpu(self._gpu):
            _allow(self._mapping, self._gpu, write=not shared)
        if not shared:
            _OPENED[self.region.addr] = self

    def descriptor_at(self, addr: int) -> int:
        """A new one of the piece there, which the caller closes."""
        return os.dup(self._fds[max(at for at in self._fds if at <= addr)])


_OPENED: weakref.WeakValueDictionary[int, OpenedGpuMemory] = weakref.WeakValueDictionary()


def opened_at(addr: int) -> OpenedGpuMemory | None:
    """What was opened here, may be handed on, and has the address."""
    for memory in list(_OPENED.values()):
        if memory.region.addr <= addr < memory.region.end:
            return memory
    return None


def _allow(mapping: Mapping, gpu: int, *, write: bool = True) -> None:
    mapping.allow(write=write)
    for other in range(torch.cuda.device_count()):
        if other != gpu and torch.cuda.can_device_access_peer(other, gpu):
            mapping.allow(other, write=write)


class _Bytes:
    """Of memory, for torch, which keeps this object."""

    def __init__(self, memory: _Memory, addr: int, nbytes: int) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (addr, False),
            "strides": None,
            "version": 3,
        }


def _free(mapping: Mapping, gpu: int, pid: int, fds: dict[int, int] | None = None) -> None:
    """When nothing refers to its tensors any more, though the GPU may still work on them."""
    if os.getpid() != pid:  # a forked child's copy, which has no CUDA
        return
    with suppress(EngineFailed), on_gpu(gpu):  # of a GPU that has failed nothing can be freed
        cuda_memory.calls().cuCtxSynchronize()
        mapping.close()
    close_all(list((fds or {}).values()))
