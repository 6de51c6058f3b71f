"""Memory of CUDA's virtual memory calls (`cuMemCreate`): physical memory with a handle, mapped at
addresses that are reserved for it.

It is shared by file descriptors, one for each handle. torch's expandable segments are such memory,
in many small pieces. A handle that is released stays as long as its memory is mapped, or a process
has a descriptor of it. Errors of the driver become EngineFailed here. Starts no thread.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from engine_loader.errors import EngineFailed
from engine_loader.tensors.cuda import check, driver
from engine_registry.schema.manifest import Region

_DESCRIPTOR = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ, _READ_AND_WRITE = 1, 3  # CU_MEM_ACCESS_FLAGS_PROT_…
_RDMA_WITH_VMM = 110  # CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED


class _Place(ctypes.Structure):
    _fields_: ClassVar = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Flags(ctypes.Structure):
    _fields_: ClassVar = [
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_: ClassVar = [
        ("type", ctypes.c_int),
        ("handles", ctypes.c_int),
        ("place", _Place),
        ("win32", ctypes.c_void_p),
        ("flags", _Flags),
    ]


class _Access(ctypes.Structure):
    _fields_: ClassVar = [("place", _Place), ("flags", ctypes.c_int)]


def granularity(gpu: int) -> int:
    """Sizes of memory are multiples of it."""
    nbytes = ctypes.c_size_t()
    properties = _properties(gpu)
    check(
        calls().cuMemGetAllocationGranularity(ctypes.byref(nbytes), ctypes.byref(properties), 0),
        f"cuda:{gpu} has no memory that can be shared by descriptors",
    )
    return nbytes.value


def create(gpu: int, nbytes: int) -> int:
    """The handle of new memory, which RDMA can reach where the GPU supports that."""
    handle = ctypes.c_uint64()
    properties = _properties(gpu)
    check(
        calls().cuMemCreate(ctypes.byref(handle), nbytes, ctypes.byref(properties), 0),
        f"no {nbytes} bytes can be had of cuda:{gpu}",
    )
    return handle.value


@functools.cache
def _rdma(gpu: int) -> int:
    found = ctypes.c_int()
    code = calls().cuDeviceGetAttribute(ctypes.byref(found), _RDMA_WITH_VMM, gpu)
    return int(code == 0 and found.value != 0)


def _properties(gpu: int) -> _Properties:
    return _Properties(_PINNED, _DESCRIPTOR, _Place(_DEVICE, gpu), None, _Flags(rdma=_rdma(gpu)))


def retain(addr: int) -> int:
    """The handle of the memory that is mapped there, until `release`."""
    handle = ctypes.c_uint64()
    check(
        calls().cuMemRetainAllocationHandle(ctypes.byref(handle), addr),
        f"the memory at {addr:#x} is not of cuMemCreate",
    )
    return handle.value


def release(handle: int) -> None:
    calls().cuMemRelease(handle)


def to_descriptor(handle: int) -> int:
    """A new one, which the caller closes."""
    fd = ctypes.c_int()
    check(
        calls().cuMemExportToShareableHandle(ctypes.byref(fd), handle, _DESCRIPTOR, 0),
        "the memory of the GPU was not made to be shared by descriptors",
    )
    os.set_inheritable(fd.value, False)
    return fd.value


def from_descriptor(fd: int) -> int:
    """The handle of another process's memory, until `release`. It does not need the descriptor."""
    handle = ctypes.c_uint64()
    check(
        calls().cuMemImportFromShareableHandle(
            ctypes.byref(handle), ctypes.c_void_p(fd), _DESCRIPTOR
        ),
        "a descriptor is of no memory of a GPU of this process (CUDA_VISIBLE_DEVICES)",
    )
    return handle.value


def gpu_of_descriptor(fd: int, current: int) -> int:
    """The number here of the GPU whose memory that is; EngineFailed. `current` is any GPU."""
    with on_gpu(current):
        handle = from_descriptor(fd)
        try:
            properties = _Properties()
            check(
                calls().cuMemGetAllocationPropertiesFromHandle(ctypes.byref(properties), handle),
                "of which GPU a descriptor is cannot be found out",
            )
            return int(properties.place.id)
        finally:
            release(handle)


def is_shareable(addr: int) -> bool:
    """Whether memory of a GPU at that address can be shared by descriptors."""
    try:
        handle = retain(addr)
    except EngineFailed:
        return False
    try:
        properties = _Properties()
        code = calls().cuMemGetAllocationPropertiesFromHandle(ctypes.byref(properties), handle)
        return code == 0 and bool(properties.handles & _DESCRIPTOR)
    finally:
        release(handle)


def piece_at(addr: int) -> Region:
    """What is mapped there of one handle."""
    start, nbytes = ctypes.c_uint64(), ctypes.c_size_t()
    check(
        calls().cuMemGetAddressRange_v2(ctypes.byref(start), ctypes.byref(nbytes), addr),
        f"there is no memory of a GPU at {addr:#x}",
    )
    return Region(start.value, nbytes.value)


class Mapping:
    """Handles that are mapped one behind another, for one GPU. One thread at a time."""

    def __init__(self, gpu: int, nbytes: int) -> None:
        """Reserves addresses for so many bytes; EngineFailed."""
        self._gpu = gpu
        self._pieces: list[Region] = []
        addr = ctypes.c_uint64()
        check(
            calls().cuMemAddressReserve(ctypes.byref(addr), nbytes, 0, 0, 0),
            f"no {nbytes} bytes of addresses can be had for cuda:{gpu}",
        )
        self.region = Region(addr.value, nbytes)
        self._end = addr.value
        self._closed = False

    def add(self, handle: int, nbytes: int) -> None:
        """Behind what is mapped already. The handle need not be kept."""
        check(
            calls().cuMemMap(self._end, nbytes, 0, handle, 0),
            f"a piece of {nbytes} bytes cannot be mapped",
        )
        self._pieces.append(Region(self._end, nbytes))
        self._end += nbytes

    @property
    def nbytes(self) -> int:
        """How many are mapped."""
        return self._end - self.region.addr

    def allow(self, gpu: int | None = None, *, write: bool = True) -> None:
        """Lets the GPU, or another one, read and write what is mapped, or only read it."""
        gpu = self._gpu if gpu is None else gpu
        access = _Access(_Place(_DEVICE, gpu), _READ_AND_WRITE if write else _READ)
        check(
            calls().cuMemSetAccess(self.region.addr, self.nbytes, ctypes.byref(access), 1),
            f"cuda:{gpu} does not reach the memory (nvidia-smi topo -p2p r)",
        )

    def close(self) -> None:
        """Any number of times."""
        while self._pieces:
            piece = self._pieces.pop()
            calls().cuMemUnmap(piece.addr, piece.nbytes)
        if not self._closed:
            calls().cuMemAddressFree(self.region.addr, self.region.nbytes)
            self._closed = True


@contextmanager
def on_gpu(gpu: int) -> Iterator[ctypes.c_void_p]:
    """The context of the GPU, as torch has it, is the thread's current one, as the driver needs."""
    torch.cuda.init()
    number = ctypes.c_int(gpu)
    context = ctypes.c_void_p()
    failed = f"cuda:{number.value} cannot be used"
    check(calls().cuDevicePrimaryCtxRetain(ctypes.byref(context), number), failed)
    try:
        check(calls().cuCtxPushCurrent_v2(context), failed)
        try:
            yield context
        finally:
            calls().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    finally:
        calls().cuDevicePrimaryCtxRelease_v2(number)


@functools.cache
def calls() -> Any:
    """The driver, which knows how wide the arguments of its calls are."""
    loaded = driver()
    wide, size, pointer = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
    for name, arguments in {
        "cuMemGetAllocationGranularity": [pointer, pointer, ctypes.c_int],
        "cuMemGetAllocationPropertiesFromHandle": [pointer, wide],
        "cuMemCreate": [pointer, size, pointer, wide],
        "cuMemRetainAllocationHandle": [pointer, pointer],
        "cuMemRelease": [wide],
        "cuMemExportToShareableHandle": [pointer, wide, ctypes.c_int, wide],
        "cuMemImportFromShareableHandle": [pointer, pointer, ctypes.c_int],
        "cuMemGetAddressRange_v2": [pointer, pointer, wide],
        "cuMemAddressReserve": [pointer, size, size, wide, wide],
        "cuMemAddressFree": [wide, size],
        "cuMemMap": [wide, size, size, wide, wide],
        "cuMemUnmap": [wide, size],
        "cuMemSetAccess": [wide, size, pointer, size],
        "cuMemHostRegister_v2": [wide, size, ctypes.c_uint],
        "cuMemHostGetDevicePointer_v2": [pointer, wide, ctypes.c_uint],
        "cuMemHostUnregister": [wide],
    }.items():
        getattr(loaded, name).argtypes = arguments
    return loaded
