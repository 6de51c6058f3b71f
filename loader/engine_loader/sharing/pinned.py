"""Memory of the host, as GPUs of this process read it: mapped and registered with CUDA.

Registering pins every page, which takes time. So it is done part by part, as reads reach them and
while the GPU copies the parts before, and once for all GPUs. Starts no thread.
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress

from engine_loader.errors import EngineFailed
from engine_loader.tensors.cuda import check
from engine_loader.tensors.cuda_memory import calls, on_gpu
from engine_loader.tensors.host_memory import map_sealed
from engine_registry.schema.manifest import Region

_PORTABLE, _DEVICEMAP = 1, 2  # CU_MEMHOSTREGISTER_…: for all GPUs, and at addresses of theirs
_PART_NBYTES = 256 << 20


class Pinned:
    """An arena of the host, at an address of its own that the host and all GPUs use."""

    def __init__(self, fd: int, nbytes: int) -> None:
        """Of an arena of exactly so many bytes, whose descriptor need not be kept. EngineFailed
        where it is something else.
        """
        self._memory = map_sealed(fd, nbytes)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._parts: dict[int, int] = {}  # by address: those that are registered, with a GPU
        self.region = Region(ctypes.addressof(ctypes.c_char.from_buffer(self._memory)), nbytes)

    def pin(self, start: int, nbytes: int, gpu: int) -> None:
        """From now on GPUs can read so many bytes, from the start on; EngineFailed."""
        first = self.region.addr + start // _PART_NBYTES * _PART_NBYTES
        with self._lock:
            for addr in range(first, self.region.addr + start + nbytes, _PART_NBYTES):
                if addr not in self._parts:
                    with on_gpu(gpu):
                        self._register(addr, gpu)

    def _register(self, addr: int, gpu: int) -> None:
        nbytes = min(_PART_NBYTES, self.region.end - addr)
        check(
            calls().cuMemHostRegister_v2(addr, nbytes, _PORTABLE | _DEVICEMAP),
            f"{nbytes} bytes of the host's memory cannot be pinned for GPUs: raise the limit of "
            "locked memory (ulimit -l), or free memory",
        )
        self._parts[addr] = gpu
        there = ctypes.c_uint64()
        check(
            calls().cuMemHostGetDevicePointer_v2(ctypes.byref(there), addr, 0),
            f"cuda:{gpu} does not reach the host's memory",
        )
        if there.value != addr:
            raise EngineFailed(f"cuda:{gpu} has other addresses for the host's memory")

    def close(self) -> None:
        """Any number of times. No GPU may read it any more."""
        while self._parts:
            addr, gpu = self._parts.popitem()
            if os.getpid() == self._pid:  # a forked child has no CUDA
                with suppress(EngineFailed), on_gpu(gpu):
                    calls().cuMemHostUnregister(addr)
        self._memory.close()
