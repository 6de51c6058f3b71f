"""What CUDA adds: memory as the driver allocated it, and work that goes on after a call has
returned.

Where there is no CUDA nothing of it does anything.
"""

from __future__ import annotations

import ctypes
import functools
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from engine_loader.errors import EngineFailed
from engine_registry.schema.manifest import Region

# of enum CUpointer_attribute, and of CUmemorytype
_MEMORY_TYPE, _OF_DEVICE = 2, 2
_DEVICE_ORDINAL, _IS_LEGACY_CUDA_IPC_CAPABLE, _RANGE_START_ADDR, _RANGE_SIZE = (
    9,
    10,
    11,
    12,
)
_MAPPING_SIZE, _MAPPING_BASE_ADDR = 18, 19
_KIND_AND_ORDINAL = (ctypes.c_int * 2)(_MEMORY_TYPE, _DEVICE_ORDINAL)


def allocation_at(addr: int) -> Region:
    """The allocation of the driver's that an address of device memory lies in: of torch's
    allocator, one of its segments. Of memory of cuMemCreate, as of expandable segments, what is
    mapped there of one handle: its range is all of the addresses that are reserved.
    """
    if can_be_opened_by_others(addr):
        return Region(_attribute(_RANGE_START_ADDR, addr), _attribute(_RANGE_SIZE, addr))
    return Region(_attribute(_MAPPING_BASE_ADDR, addr), _attribute(_MAPPING_SIZE, addr))


def to_register(region: Region, device_type: str) -> Region:
    """Of device memory the whole allocation: Mooncake, and CUDA's way to share memory between
    processes, know nothing smaller.

    What is not in one allocation, as expandable segments may have it, stays as it is.
    """
    if device_type != "cuda":
        return region
    allocation = allocation_at(region.addr)
    return allocation if region.end <= allocation.end else region


def device_of(addr: int) -> int | None:
    """The number of the GPU that has the memory; None where it is not CUDA's."""
    kind, ordinal = ctypes.c_uint64(), ctypes.c_uint64()
    places = (ctypes.c_void_p * 2)(ctypes.addressof(kind), ctypes.addressof(ordinal))
    # In one call, as loads ask for each region. It succeeds for any address.
    code = driver().cuPointerGetAttributes(2, _KIND_AND_ORDINAL, places, ctypes.c_uint64(addr))
    if code != 0 or kind.value & 0xFFFFFFFF != _OF_DEVICE:
        return None
    return ordinal.value & 0xFFFFFFFF


@functools.cache
def uuid_of(gpu: int) -> str:
    """Of the GPU with that number, as nvidia-smi prints it; EngineFailed."""
    torch.cuda.init()  # the driver answers nothing before
    device, found = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    failed = f"cuda:{gpu} has no UUID"
    check(driver().cuDeviceGet(ctypes.byref(device), gpu), failed)
    check(driver().cuDeviceGetUuid_v2(ctypes.byref(found), device), failed)
    return f"GPU-{uuid.UUID(bytes=bytes(found))}"


def can_be_opened_by_others(addr: int) -> bool:
    """By other processes of the host: memory of cudaMalloc, not of expandable segments or memory
    pools.
    """
    return bool(_attribute(_IS_LEGACY_CUDA_IPC_CAPABLE, addr))


@contextmanager
def on_device_of(addr: int) -> Iterator[None]:
    """The thread's current device is the one that holds the address: a thread that asks the driver
    about memory has to be there.
    """
    with torch.cuda.device(_attribute(_DEVICE_ORDINAL, addr)):
        yield


def device_here() -> AbstractContextManager[Any]:
    """For another thread, which begins on the first device: this thread's current one."""
    if not torch.cuda.is_initialized():
        return nullcontext()
    return torch.cuda.device(torch.cuda.current_device())


def pci_address() -> str:
    """Of this thread's current device, as the kernel writes it; empty where CUDA is not in use:
    asking for it does not start CUDA.
    """
    if not torch.cuda.is_initialized():
        return ""
    found: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    if not hasattr(found, "pci_bus_id"):  # torch before 2.8
        return ""
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def _attribute(attribute: int, addr: int) -> int:
    """Of device memory, of whichever device."""
    value = ctypes.c_uint64()  # as wide as the widest of them; the driver writes the lower bytes
    code = driver().cuPointerGetAttribute(ctypes.byref(value), attribute, ctypes.c_uint64(addr))
    if code != 0:
        raise EngineFailed(
            f"CUDA does not know the memory at {addr:#x} (error {code} for attribute {attribute})"
        )
    return value.value


@functools.cache
def driver() -> Any:
    """CUDA's driver, which torch has loaded too."""
    return ctypes.CDLL("libcuda.so.1")


def check(code: int, what: str, remedy: str = "") -> None:
    """EngineFailed, with the name of the driver's error, where a call has returned one."""
    if code:
        name = ctypes.c_char_p()
        driver().cuGetErrorName(code, ctypes.byref(name))
        error = name.value.decode() if name.value else f"error {code}"
        raise EngineFailed(f"{what} ({error})", remedy)


def wait_for(devices: Iterable[torch.device]) -> None:
    """Until all that they were asked to do is done, by whatever stream."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


@contextmanager
def on_default_stream(device: torch.device) -> Iterator[None]:
    """Copies between devices that are begun in here, by anybody's code in this thread, follow each
    other, as they are all on one stream; and the thread does not take up memory on other devices.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.default_stream(device)):
        yield
