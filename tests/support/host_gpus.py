"""The host's memory in the place of GPUs, and the kernel of cuda_ipc run by Triton's interpreter.

So the engine is tested where there is no GPU. What is allocated here can be mapped by other
processes, and stays as long as one of them has it mapped, as memory of GPUs does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Sequence

import torch

from engine_loader.engines.cuda_ipc.launch import Launch, Made
from engine_loader.engines.cuda_ipc.table import Copy, table_of
from engine_loader.engines.cuda_ipc.tallies import Sums
from engine_loader.errors import EngineFailed
from engine_registry.schema.manifest import Export
from tests.support.interpreted import interpreted

KERNEL = "engine_loader.engines.cuda_ipc.kernel"
_END = 1 << 47


class HostGpus:
    """One, numbered 0, whose memory is the host's."""

    def __init__(self) -> None:
        self._allocated: list[tuple[Export, mmap.mmap]] = []
        self._opened: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> int:
        """The address of memory that other processes can open, as long as this object lives."""
        fd = os.memfd_create("memory of a GPU")
        weakref.finalize(self, os.close, fd)
        os.ftruncate(fd, nbytes)
        mapped = mmap.mmap(fd, nbytes)
        export = Export(_address(mapped), nbytes, f"/proc/{os.getpid()}/fd/{fd}".encode())
        self._allocated.append((export, mapped))
        return export.addr

    @property
    def opened(self) -> int:
        """How many allocations of other processes are mapped."""
        return len(self._opened)

    @property
    def mapped(self) -> set[int]:
        """Where they are."""
        return set(self._opened)

    def gpu_of(self, addr: int) -> int | None:
        return 0

    def number_of(self, device: torch.device) -> int | None:
        return 0

    def current(self) -> int:
        return 0

    def export(self, addr: int) -> Export:
        """Of what was not allocated here one that nobody can open."""
        for export, _ in self._allocated:
            if export.addr <= addr < export.end:
                return export
        return Export(0, _END, b"of this process")

    def open(self, export: Export, gpu: int) -> int:
        try:
            with open(export.handle, "r+b") as memory:
                mapped = mmap.mmap(memory.fileno(), 0)
        except (OSError, ValueError) as exc:
            raise EngineFailed(f"its process has ended ({exc})") from exc
        if (nbytes := len(mapped)) < export.nbytes:
            mapped.close()
            raise EngineFailed(f"{export.nbytes} bytes are exported of an allocation of {nbytes}")
        addr = _address(mapped)
        with self._lock:
            self._opened[addr] = mapped
        return addr

    def close(self, addr: int, gpu: int) -> None:
        with self._lock:
            self._opened.pop(addr).close()

    def reach(self, addr: int, gpu: int) -> None:
        pass

    def launch(self, gpu: int | None, copies: Sequence[Copy], sums: Sums | None) -> Launch:
        table = table_of(copies, sums.blocks if sums is not None else None)
        with interpreted(KERNEL) as kernel:
            for unit, rows in table.rows.items():
                kernel.copy_rows(
                    torch.from_numpy(rows),
                    sums.memory if sums is not None else torch.zeros(1, dtype=torch.int64),
                    unit,
                )
        if sums is not None:
            sums.add(Made(), table.added(len(sums.blocks)))
        return Made()


def _address(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))
