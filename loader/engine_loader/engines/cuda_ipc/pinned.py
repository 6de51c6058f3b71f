"""Memory of the host, as GPUs of this process read it: mapped and registered with CUDA.

Registering pins every page. It is done once for all GPUs. Starts no thread.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

from engine_loader.errors import EngineFailed
from engine_loader.tensors.cuda_memory import calls, check, on_gpu
from engine_loader.tensors.host_memory import map_sealed
from engine_registry.schema.manifest import Region

_PORTABLE, _DEVICEMAP = 1, 2  # CU_MEMHOSTREGISTER_…: for all GPUs, and at addresses of theirs


class Pinned:
    """An arena of the host, at an address of its own that the host and all GPUs use."""

    def __init__(self, fd: int, nbytes: int, gpu: int) -> None:
        """Of an arena of exactly so many bytes, whose descriptor need not be kept. EngineFailed
        where it is something else, or cannot be pinned.
        """
        self._memory = map_sealed(fd, nbytes)
        self._gpu = gpu
        self._pid = os.getpid()
        self._registered = False
        addr = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.region = Region(addr, nbytes)
        try:
            with on_gpu(gpu):
                self._register()
        except BaseException:
            self.close()
            raise

    def _register(self) -> None:
        addr, nbytes = self.region
        check(
            calls().cuMemHostRegister_v2(addr, nbytes, _PORTABLE | _DEVICEMAP),
            f"{nbytes} bytes of the host's memory cannot be pinned for GPUs: raise the limit of "
            "locked memory (ulimit -l), or free memory",
        )
        self._registered = True
        there = ctypes.c_uint64()
        check(
            calls().cuMemHostGetDevicePointer_v2(ctypes.byref(there), addr, 0),
            f"cuda:{self._gpu} does not reach the host's memory",
        )
        if there.value != addr:
            raise EngineFailed(f"cuda:{self._gpu} has other addresses for the host's memory")

    def close(self) -> None:
        """Any number of times. No GPU may read it any more."""
        if self._registered and os.getpid() == self._pid:  # a forked child has no CUDA
            with suppress(EngineFailed), on_gpu(self._gpu):
                calls().cuMemHostUnregister(self.region.addr)
        self._registered = False
        self._memory.close()
