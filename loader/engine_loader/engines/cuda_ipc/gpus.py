"""What the engine needs of CUDA: handles of allocations, memory mapped by a handle, and launches of
the kernel.

The handles are those of CUDA's interprocess communication, of 64 bytes, which the driver makes for
an allocation of cudaMalloc. A process opens one for each GPU that reads. Memory stays as long as
anybody has it mapped, also when its process has ended.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch

from engine_loader.engines.cuda_ipc.table import COLUMNS, Copy, table_of
from engine_loader.engines.cuda_ipc.tallies import Sums
from engine_loader.errors import EngineFailed, EngineUnavailable
from engine_loader.tensors.cuda import (
    allocation_at,
    can_be_opened_by_others,
    device_here,
    device_of,
    driver,
)
from engine_loader.tensors.modes import plain_torch
from engine_registry.schema.manifest import Export

_HANDLE_NBYTES = 64
_SHORT_NBYTES = 16 << 10  # of a table: a shorter one is copied sooner than memory is pinned for it
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class Launch(Protocol):
    """Copies that a GPU makes."""

    def done(self) -> bool:
        """Whether they have been made; EngineFailed where the GPU has failed. Never waits."""

    def wait(self) -> None:
        """Until they have been made."""


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
        if importlib.util.find_spec("triton") is None:
            raise EngineUnavailable(
                "Triton is not installed, whose kernel reads over cuda_ipc",
                "pip install triton, or use nvlink_intra",
            )
        threading.Thread(
            target=_prepare, args=(device_here(),), name="kernel of cuda_ipc", daemon=True
        ).start()

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

    @plain_torch()
    def launch(self, gpu: int | None, copies: Sequence[Copy], sums: Sums | None) -> Launch:
        if gpu is None:
            with _on(self.current()):
                for copy in copies:
                    _to_host(copy)
            return Made()
        table = table_of(copies, sums.blocks if sums is not None else None)
        device = torch.device("cuda", gpu)
        stream = next(_streams(gpu))
        held: list[torch.Tensor] = []
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for unit, rows in table.rows.items():
                here = torch.from_numpy(rows)
                if rows.nbytes > _SHORT_NBYTES:
                    here = here.pin_memory()
                there = here.to(device, non_blocking=True)
                held += [here, there]
                _copy_rows(there, sums.memory if sums is not None else there, unit)
            event = torch.cuda.Event()
            event.record(stream)
        if sums is not None:
            held.append(sums.memory)
            sums.nbytes += table.added(len(sums.blocks))
        return _Launched(event, held)


def _copy_rows(table: torch.Tensor, sums: torch.Tensor, unit: int) -> None:
    try:
        from engine_loader.engines.cuda_ipc.kernel import copy_rows

        copy_rows(table, sums, unit)
    except Exception as exc:  # Triton has no common base of its errors
        raise EngineFailed(
            f"Triton cannot compile or start its kernel ({_first_line(exc)})",
            "install a C compiler (apt install gcc), or use nvlink_intra",
        ) from exc


def _prepare(device: AbstractContextManager[Any]) -> None:
    """Triton takes half a second to be imported, and longer to compile: not in the first load. A
    process that has not used a GPU yet does not begin to here.
    """
    with suppress(Exception), device, plain_torch():  # the first launch says what is wrong
        importlib.import_module("engine_loader.engines.cuda_ipc.kernel")
        if torch.cuda.is_initialized():
            nothing = torch.zeros((1, COLUMNS), dtype=torch.int64, device="cuda")
            _copy_rows(nothing, nothing, 4)


def _first_line(exc: Exception) -> str:
    return next(iter(str(exc).splitlines()), type(exc).__name__)


class _Launched:
    def __init__(self, event: torch.cuda.Event, held: list[torch.Tensor]) -> None:
        self._event = event
        self._held = held  # the table, until the GPU has read it

    def done(self) -> bool:
        try:
            done = self._event.query()
        except RuntimeError as exc:
            raise _gpu_failed(exc) from exc
        if done:
            self._held.clear()
        return bool(done)

    def wait(self) -> None:
        try:
            self._event.synchronize()
        except RuntimeError as exc:
            raise _gpu_failed(exc) from exc


class Made:
    """Copies that have been made."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


def _gpu_failed(exc: RuntimeError) -> EngineFailed:
    return EngineFailed(
        f"the GPU has failed while it read ({_first_line(exc)})",
        "this process cannot use it any more: start it again",
    )


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


@functools.cache
def _streams(gpu: int) -> Iterator[torch.cuda.Stream]:
    """Two in turns, so that a launch begins while the last rows of the one before are copied."""
    return itertools.cycle([torch.cuda.Stream(gpu), torch.cuda.Stream(gpu)])


@contextmanager
def _on(gpu: int) -> Iterator[None]:
    """The context of the GPU, as torch has it, is the thread's current one, as the driver needs."""
    torch.cuda.init()
    number = ctypes.c_int(gpu)
    context = ctypes.c_void_p()
    failed = f"cuda:{number.value} cannot be used"
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), number), failed)
    try:
        _check(_driver().cuCtxPushCurrent_v2(context), failed)
        try:
            yield
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
