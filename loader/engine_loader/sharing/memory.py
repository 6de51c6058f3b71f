"""Memory of GPUs and of the host, as processes share it: offered by handles or descriptors, and
opened by them.

Memory of cudaMalloc has a handle of CUDA's interprocess communication, of 64 bytes, which a process
opens for each GPU that reads. Memory of cuMemCreate and arenas of the host are opened by
descriptors: see `pieces` and `pinned`. Memory stays as long as anybody has it mapped, also when its
process has ended.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import closing

import torch

from engine_loader.errors import EngineFailed
from engine_loader.sharing.pieces import Allocation, Pieces, is_by_descriptors
from engine_loader.sharing.pinned import Pinned
from engine_loader.tensors import cuda_memory
from engine_loader.tensors.cuda import allocation_at, can_be_opened_by_others, check, device_of
from engine_loader.tensors.cuda_memory import Mapping, calls, on_gpu
from engine_loader.tensors.gpu_memory import opened_at
from engine_loader.tensors.host_memory import HostMemory, memory_at
from engine_registry.schema.manifest import Export, Region

_HANDLE_NBYTES = 64
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * _HANDLE_NBYTES)]


class SharedMemory:
    """That of the GPUs that this process sees, and of the host."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By address: what was opened by descriptors.
        self._mapped: dict[int, Mapping | Pinned] = {}
        self._own: weakref.WeakKeyDictionary[HostMemory, Pinned] = weakref.WeakKeyDictionary()

    def can_be_shared(self, addr: int) -> bool:
        """Whether other processes can open the memory there."""
        gpu = _gpu_of(addr)
        if gpu is None:
            return memory_at(addr) is not None
        if opened_at(addr) is not None or can_be_opened_by_others(addr):
            return True
        with on_gpu(gpu):
            return cuda_memory.is_shareable(addr)

    def allocations(self, region: Region) -> Sequence[Allocation]:
        """What the region lies in; EngineFailed where others cannot open all of it."""
        gpu = _gpu_of(region.addr)
        if gpu is None:
            whole = _arena_at(region.addr).region
            return [Allocation(*whole, b"", on_host=True)]
        with on_gpu(gpu):
            if can_be_opened_by_others(region.addr):
                whole = allocation_at(region.addr)
                return [Allocation(whole.addr, whole.nbytes, _handle_of(whole.addr))]
            found: list[Allocation] = []
            at = region.addr
            while at < region.end:
                if opened_at(at) is None and not cuda_memory.is_shareable(at):
                    raise _not_shared(at)
                piece = cuda_memory.piece_at(at)
                found.append(Allocation(piece.addr, piece.nbytes, b""))
                at = piece.end
            return found

    def descriptor(self, addr: int) -> int:
        """A new one of the allocation there, which the caller closes; EngineFailed."""
        gpu = _gpu_of(addr)
        if gpu is None:
            return _arena_at(addr).descriptor()
        if (opened := opened_at(addr)) is not None:
            return opened.descriptor_at(addr)
        with on_gpu(gpu):
            handle = cuda_memory.retain(addr)
            try:
                return cuda_memory.to_descriptor(handle)
            finally:
                cuda_memory.release(handle)

    def open(self, export: Export, gpu: int) -> int:
        """Where that GPU has another process's allocations from now on.

        EngineFailed where the process, or its keeper, has ended, the GPU does not reach its memory,
        or there is less of it than the export says.
        """
        with on_gpu(gpu):
            if not is_by_descriptors(export):
                return _open_handle(export, gpu)
            pieces = Pieces.decode(export)
            mapping = _on_host(pieces) if pieces.on_host else _mapped(pieces, gpu)
        with self._lock:
            self._mapped[mapping.region.addr] = mapping
        return mapping.region.addr

    def pin(self, addr: int, start: int, nbytes: int, gpu: int) -> None:
        """Lets the GPU read bytes of the host's memory that was opened at that address. They begin
        so many bytes behind it. EngineFailed where they cannot be pinned.
        """
        with self._lock:
            memory = self._mapped[addr]
        if isinstance(memory, Pinned):
            memory.pin(start, nbytes, gpu)

    def pinned(self, addr: int, nbytes: int, gpu: int) -> int:
        """Where GPUs have these bytes of an arena of this process; EngineFailed.

        They stay pinned until the arena is gone.
        """
        memory = _arena_at(addr)
        with self._lock:
            found = self._own.get(memory)
            if found is None:
                fd = memory.descriptor()
                try:
                    found = self._own[memory] = Pinned(fd, memory.region.nbytes)
                finally:
                    os.close(fd)
                weakref.finalize(memory, found.close).atexit = False
        start = addr - memory.region.addr
        found.pin(start, nbytes, gpu)
        return found.region.addr + start

    def close(self, addr: int, gpu: int) -> None:
        """Ends one `open`."""
        with self._lock:
            mapping = self._mapped.pop(addr, None)
        with on_gpu(gpu):
            if mapping is not None:
                mapping.close()
            else:
                calls().cuIpcCloseMemHandle(ctypes.c_uint64(addr))


def _gpu_of(addr: int) -> int | None:
    """The number of the GPU that has the memory; None where the host has it."""
    if memory_at(addr) is not None or not torch.cuda.is_available():
        return None
    return device_of(addr)


def _mapped(pieces: Pieces, gpu: int) -> Mapping:
    mapping = Mapping(gpu, sum(pieces.sizes))
    try:
        with closing(pieces.opened()) as opened:
            for piece in opened:
                handle = cuda_memory.from_descriptor(piece.fd)
                try:
                    mapping.add(handle, piece.nbytes)
                finally:
                    cuda_memory.release(handle)
        mapping.allow()
    except BaseException:
        mapping.close()
        raise
    return mapping


def _on_host(pieces: Pieces) -> Pinned:
    with closing(pieces.opened()) as opened:
        (memory,) = [Pinned(piece.fd, piece.nbytes) for piece in opened]
    return memory


def _arena_at(addr: int) -> HostMemory:
    memory = memory_at(addr)
    if memory is None:
        raise EngineFailed(
            f"the memory of the host at {addr:#x} is in no arena, so GPUs and other processes "
            "cannot reach it",
            "move the tensors into an arena (arena_of)",
        )
    return memory


def _not_shared(addr: int) -> EngineFailed:
    return EngineFailed(
        f"the memory at {addr:#x} cannot be opened by other processes",
        "serve other memory than that of memory pools (cudaMallocAsync)",
    )


def _handle_of(addr: int) -> bytes:
    handle = _Handle()
    check(
        calls().cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(addr)),
        f"no handle for the memory at {addr:#x}",
    )
    return bytes(memoryview(handle))


def _open_handle(export: Export, gpu: int) -> int:
    if len(export.handle) != _HANDLE_NBYTES:
        raise EngineFailed(f"a handle of {len(export.handle)} bytes is none of CUDA's")
    addr = ctypes.c_uint64()
    opening = calls().cuIpcOpenMemHandle_v2
    opening.argtypes = [ctypes.c_void_p, _Handle, ctypes.c_uint]
    check(
        opening(ctypes.byref(addr), _Handle.from_buffer_copy(export.handle), _LAZY_PEER_ACCESS),
        f"its process has ended, or its GPU is not reached by cuda:{gpu} (nvidia-smi topo -p2p r)",
    )
    nbytes = ctypes.c_size_t()
    code = calls().cuMemGetAddressRange_v2(None, ctypes.byref(nbytes), addr)
    if code or nbytes.value < export.nbytes:
        calls().cuIpcCloseMemHandle(addr)
        raise EngineFailed(f"{export.nbytes} bytes are exported of an allocation of {nbytes.value}")
    return addr.value
