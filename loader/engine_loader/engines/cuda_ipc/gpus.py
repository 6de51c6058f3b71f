"""What the engine needs of CUDA: handles of allocations, and memory mapped by a handle.

The handles are those of CUDA's interprocess communication, of 64 bytes, which the driver makes for
an allocation of cudaMalloc. A process opens one for each GPU that reads. Memory stays as long as
anybody has it mapped, also when its process has ended.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from engine_loader.engines.cuda_ipc.launch import Launch, Made
from engine_loader.engines.cuda_ipc.launcher import KERNELS, Launcher, prepare
from engine_loader.engines.cuda_ipc.table import Copy
from engine_loader.engines.cuda_ipc.tallies import Sums
from engine_loader.errors import EngineFailed, EngineUnavailable
from engine_loader.kernels.kernel import can_be_had
from engine_loader.tensors.cuda import (
    allocation_at,
    can_be_opened_by_others,
    device_here,
    device_of,
    driver,
)
from engine_registry.schema.manifest import Export

_HANDLE_NBYTES = 64
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_PEER_ACCESS_ENABLED = 704  # CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED: torch has done it


class Gpus(Protocol):
    """Where the engine reads from and to. GPUs are given by their numbers."""

    def gpu_of(self, addr: int) -> int | None:
        """The GPU that has the memory; None where the host has it."""

    def number_of(self, device: torch.device) -> int | None:
        """Of a GPU; None where it is none."""

    def current(self) -> int:
        """The calling thread's GPU."""

    def export(self, addr: int) -> Export:
        """The allocation that has the address; EngineFailed where others cannot open it."""

    def open(self, export: Export, gpu: int) -> int:
        """Where that GPU has another process's allocation from now on.

        EngineFailed where the process has ended, the GPU does not reach its memory, or the
        allocation is shorter than the export says.
        """

    def close(self, addr: int, gpu: int) -> None:
        """Ends one `open`."""

    def reach(self, addr: int, gpu: int) -> None:
        """From now on that GPU can read this process's memory there.

        EngineFailed where there is no way between the two GPUs.
        """

    def launch(self, gpu: int | None, copies: Sequence[Copy], sums: Sums | None) -> Launch:
        """Begins the copies, on that GPU; into memory of the host (None) they are made at once."""


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * _HANDLE_NBYTES)]


class CudaGpus:
    """The GPUs that this process sees."""

    def __init__(self) -> None:
        """EngineUnavailable where there are none, or no Triton."""
        if not torch.cuda.is_available():
            raise EngineUnavailable(
                "no GPU of CUDA can be used here", "use tcp or rdma; see engines doctor"
            )
        if not can_be_had(KERNELS.values(), 0):
            raise EngineUnavailable(
                "the kernels of cuda_ipc are not compiled, and Triton is not installed",
                "pip install triton, or run `engines warm` where it is; or use nvlink_intra",
            )
        threading.Thread(
            target=prepare, args=(device_here(),), name="kernel of cuda_ipc", daemon=True
        ).start()
        self._launcher = Launcher()
        self._reached: set[tuple[int, int]] = set()  # GPUs, and those whose memory they reach

    def gpu_of(self, addr: int) -> int | None:
        return device_of(addr)

    def number_of(self, device: torch.device) -> int | None:
        if device.type != "cuda":
            return None
        return self.current() if device.index is None else device.index

    def current(self) -> int:
        return torch.cuda.current_device()

    def export(self, addr: int) -> Export:
        gpu = device_of(addr)
        if gpu is None or not can_be_opened_by_others(addr):
            raise EngineFailed(
                f"the memory at {addr:#x} cannot be opened by other processes",
                "serve memory of cudaMalloc, not the host's, nor expandable segments "
                "(PYTORCH_CUDA_ALLOC_CONF)",
            )
        allocation = allocation_at(addr)
        handle = _Handle()
        with _on(gpu):
            _check(
                _driver().cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(allocation.addr)),
                f"no handle for the memory at {addr:#x}",
            )
        return Export(allocation.addr, allocation.nbytes, bytes(memoryview(handle)))

    def open(self, export: Export, gpu: int) -> int:
        if len(export.handle) != _HANDLE_NBYTES:
            raise EngineFailed(f"a handle of {len(export.handle)} bytes is none of CUDA's")
        addr = ctypes.c_uint64()
        with _on(gpu):
            _check(
                _driver().cuIpcOpenMemHandle_v2(
                    ctypes.byref(addr), _Handle.from_buffer_copy(export.handle), _LAZY_PEER_ACCESS
                ),
                "its process has ended, or its GPU is not reached by "
                f"cuda:{gpu} (nvidia-smi topo -p2p r)",
            )
            nbytes = ctypes.c_size_t()
            code = _driver().cuMemGetAddressRange_v2(None, ctypes.byref(nbytes), addr)
            if code or nbytes.value < export.nbytes:
                _driver().cuIpcCloseMemHandle(addr)
                raise EngineFailed(
                    f"{export.nbytes} bytes are exported of an allocation of {nbytes.value}"
                )
        return addr.value

    def close(self, addr: int, gpu: int) -> None:
        with _on(gpu):
            _driver().cuIpcCloseMemHandle(ctypes.c_uint64(addr))

    def reach(self, addr: int, gpu: int) -> None:
        other = device_of(addr)
        if other is None or other == gpu or (gpu, other) in self._reached:
            return
        with _on(other) as memory, _on(gpu):
            code = _driver().cuCtxEnablePeerAccess(memory, 0)
            if code != _PEER_ACCESS_ENABLED:
                _check(code, f"cuda:{gpu} does not reach cuda:{other} (nvidia-smi topo -p2p r)")
        self._reached.add((gpu, other))

    def launch(self, gpu: int | None, copies: Sequence[Copy], sums: Sums | None) -> Launch:
        if gpu is not None:
            return self._launcher.launch(gpu, copies, sums)
        with _on(self.current()):
            for copy in copies:
                _to_host(copy)
        return Made()


def _to_host(copy: Copy) -> None:
    lines = [copy.lines] if copy.lines is not None else []
    runs = [
        (copy.src + run.src, copy.dst + run.dst, run.nbytes)
        for some in lines
        for run in some.along(len(some.counts))
    ] or [(copy.src, copy.dst, copy.nbytes)]
    for src, dst, nbytes in runs:
        _check(
            _driver().cuMemcpyDtoH_v2(
                ctypes.c_void_p(dst), ctypes.c_uint64(src), ctypes.c_size_t(nbytes)
            ),
            "the memory of the GPU cannot be copied to the host's",
        )


@contextmanager
def _on(gpu: int) -> Iterator[ctypes.c_void_p]:
    """The context of the GPU, as torch has it, is the thread's current one, as the driver needs."""
    torch.cuda.init()
    number = ctypes.c_int(gpu)
    context = ctypes.c_void_p()
    failed = f"cuda:{number.value} cannot be used"
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), number), failed)
    try:
        _check(_driver().cuCtxPushCurrent_v2(context), failed)
        try:
            yield context
        finally:
            _driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    finally:
        _driver().cuDevicePrimaryCtxRelease_v2(number)


def _check(code: int, what: str) -> None:
    if code:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(name))
        error = name.value.decode() if name.value else f"error {code}"
        raise EngineFailed(f"{what} ({error})")


@functools.cache
def _driver() -> Any:
    loaded = driver()
    loaded.cuIpcOpenMemHandle_v2.argtypes = [ctypes.c_void_p, _Handle, ctypes.c_uint]
    return loaded
