"""The host's memory in the place of GPUs, and the kernel of cuda_ipc run by Triton's interpreter.

So the engine is tested where there is no GPU. What is allocated here can be mapped by other
processes, and stays as long as one of them has it mapped, as memory of GPUs does. Arenas on the
host are mapped as for real GPUs.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import closing

import torch

from engine_loader.engines.cuda_ipc.launch import Launch, Made
from engine_loader.engines.cuda_ipc.table import Copy, table_of
from engine_loader.engines.cuda_ipc.tallies import Sums
from engine_loader.errors import EngineFailed
from engine_loader.sharing.pieces import Allocation, Pieces, is_by_descriptors
from engine_loader.tensors.host_memory import map_sealed, memory_at
from engine_registry import Region
from engine_registry.schema.manifest import Export
from tests.support.interpreted import interpreted

KERNEL = "engine_loader.engines.cuda_ipc.kernel"
_END = 1 << 47
_MAP_FIXED = 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


class HostGpus:
    """One, numbered 0, whose memory is the host's."""

    def __init__(self) -> None:
        self._allocated: list[tuple[Allocation, int, mmap.mmap]] = []  # with their descriptors
        self._opened: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> int:
        """The address of memory that other processes can open, as long as this object lives."""
        fd = self._memory(nbytes)
        mapped = mmap.mmap(fd, nbytes)
        handle = f"/proc/{os.getpid()}/fd/{fd}".encode()
        self._allocated.append((Allocation(_address(mapped), nbytes, handle), fd, mapped))
        return _address(mapped)

    def allocate_pieces(self, *sizes: int) -> int:
        """The address of pieces one behind another, of whole pages, that are opened by descriptors:
        as expandable segments of torch's are.
        """
        mapped = mmap.mmap(-1, sum(sizes))
        at = _address(mapped)
        for nbytes in sizes:
            fd = self._memory(nbytes)
            _map_at(at, nbytes, fd)
            self._allocated.append((Allocation(at, nbytes, b""), fd, mapped))
            at += nbytes
        return _address(mapped)

    def _memory(self, nbytes: int) -> int:
        fd = os.memfd_create("memory of a GPU")
        weakref.finalize(self, os.close, fd)
        os.ftruncate(fd, nbytes)
        return fd

    @property
    def opened(self) -> int:
        """How many exports of other processes are mapped."""
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

    def can_be_shared(self, addr: int) -> bool:
        return True

    def allocations(self, region: Region) -> Sequence[Allocation]:
        """Of what was not allocated here one that nobody can open."""
        found = [
            one for one, _, _ in self._allocated if one.addr < region.end and region.addr < one.end
        ]
        if (arena := memory_at(region.addr)) is not None:
            found = [Allocation(*arena.region, b"", on_host=True)]
        return found or [Allocation(0, _END, b"of this process")]

    def descriptor(self, addr: int) -> int:
        if (arena := memory_at(addr)) is not None:
            return arena.descriptor()
        (fd,) = [fd for one, fd, _ in self._allocated if one.addr <= addr < one.end]
        return os.dup(fd)

    def open(self, export: Export, gpu: int) -> int:
        mapped = _opened_pieces(export) if is_by_descriptors(export) else _opened(export)
        addr = _address(mapped)
        with self._lock:
            self._opened[addr] = mapped
        return addr

    def close(self, addr: int, gpu: int) -> None:
        with self._lock:
            self._opened.pop(addr).close()

    def pin(self, addr: int, start: int, nbytes: int, gpu: int) -> None:
        pass

    def reach(self, addr: int, nbytes: int, gpu: int) -> int:
        return addr

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


def _opened(export: Export) -> mmap.mmap:
    try:
        with open(export.handle, "r+b") as memory:
            mapped = mmap.mmap(memory.fileno(), 0)
    except (OSError, ValueError) as exc:
        raise EngineFailed(f"its process has ended ({exc})") from exc
    if (nbytes := len(mapped)) < export.nbytes:
        mapped.close()
        raise EngineFailed(f"{export.nbytes} bytes are exported of an allocation of {nbytes}")
    return mapped


def _opened_pieces(export: Export) -> mmap.mmap:
    pieces = Pieces.decode(export)
    if pieces.on_host:
        with closing(pieces.opened()) as opened:
            (memory,) = [map_sealed(piece.fd, piece.nbytes) for piece in opened]
        return memory
    mapped = mmap.mmap(-1, export.nbytes)
    try:
        with closing(pieces.opened()) as opened:
            for piece in opened:
                if os.fstat(piece.fd).st_size != piece.nbytes:
                    raise EngineFailed(f"{piece.nbytes} bytes are exported of other memory")
                _map_at(_address(mapped) + piece.offset, piece.nbytes, piece.fd)
    except BaseException:
        mapped.close()
        raise
    return mapped


def _map_at(addr: int, nbytes: int, fd: int) -> None:
    access = mmap.PROT_READ | mmap.PROT_WRITE
    found = _libc.mmap(addr, nbytes, access, mmap.MAP_SHARED | _MAP_FIXED, fd, 0)
    if found != addr:
        raise EngineFailed(os.strerror(ctypes.get_errno()))


def _address(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))
