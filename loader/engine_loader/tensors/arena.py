"""Memory for many tensors in one piece: one region for transfer engines, one descriptor for
processes that share it.

On a GPU it is memory of cuMemCreate (`gpu_memory`), on the host a memfd (`host_memory`). Both
outlive their process for as long as another one has the descriptor. Starts no thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine_loader.errors import EngineFailed
from engine_loader.tensors.cuda import wait_for
from engine_loader.tensors.gpu_memory import GpuMemory
from engine_loader.tensors.host_memory import HostMemory
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.usable import refuse_unusable, unusable
from engine_registry.lifetime import Closable
from engine_registry.schema.manifest import Region

_ANY_GPU = torch.device("cuda")
PIECE_NBYTES = 1 << 30  # where a GPU has no room for all of an arena beside the tensors themselves


class _Memory(Protocol):
    """It is freed with the last reference to it."""

    region: Region

    def have(self, nbytes: int) -> None:
        """The first so many bytes can be used from now on; EngineFailed."""

    def descriptor(self) -> int:
        """A new one; EngineFailed."""

    def tensor(self, start: int, nbytes: int) -> torch.Tensor:
        """Bytes that `have` was asked for, with a storage of their own. It keeps this object."""


class Arena(Closable):
    """Memory of one device for many tensors.

    The memory stays until the arena is closed and the last tensor in it is gone, as with any other
    memory of torch's. So it may be closed while its tensors are in use.

    Example:
        ```python
        with Arena("cuda:0", 8 << 30) as arena:
            weight = arena.empty((4096, 4096), torch.bfloat16)
        ```
    """

    def __init__(
        self, device: torch.device | str, nbytes: int, *, piece_nbytes: int | None = None
    ) -> None:
        """Makes an arena.

        Args:
            device: A GPU, or the host (`cpu`).
            nbytes: How many bytes tensors can have, with their alignment. There may be more, as
                memory comes in whole pages.
            piece_nbytes: On a GPU, memory is taken in pieces of about so many bytes as tensors need
                it, each of which has a descriptor. None: all at once, with one descriptor.

        Raises:
            EngineFailed: There is not so much memory, or it cannot be shared between processes.
        """
        self.device = _with_index(torch.device(device))
        self._alignment = self.alignment_on(self.device)
        nbytes = max(nbytes, 1)
        self._lock = threading.Lock()
        self._used = 0
        self._memory: _Memory | None = (
            HostMemory.of(nbytes)
            if self.device.type == "cpu"
            else GpuMemory(self.device.index, nbytes, piece_nbytes)
        )
        self.region = self._memory.region
        self._mark_open()

    @staticmethod
    def alignment_on(device: torch.device) -> int:
        """In bytes, of tensors in arenas of that device: as torch's."""
        return 512 if device.type == "cuda" else 256

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        return self.region.nbytes

    @property
    def used_nbytes(self) -> int:
        """How many of them are taken, with the gaps before aligned tensors."""
        return self._used

    @plain_torch()
    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None
    ) -> torch.Tensor:
        """A tensor in the arena, whose elements have any value.

        Args:
            shape: Its shape.
            dtype: Its dtype.
            strides: Of each dimension, in elements. None: as of a contiguous tensor.

        Returns:
            The tensor, which begins at a multiple of 256 bytes, on a GPU of 512. It has a storage
            of its own. One without elements takes no memory.

        Raises:
            EngineFailed: There is no room for it, or the arena is closed.
        """
        shape = torch.Size(shape)
        wanted = torch.empty(shape, dtype=dtype, device="meta")
        if strides is not None:
            wanted = torch.empty_strided(shape, tuple(strides), dtype=dtype, device="meta")
        if not wanted.numel():
            return torch.empty_like(wanted, device=self.device)
        steps = zip(shape, wanted.stride(), strict=True)
        elements = 1 + sum([(size - 1) * step for size, step in steps])
        storage = self.take(elements * wanted.itemsize).untyped_storage()
        return bound(storage, 0, wanted)

    @plain_torch()
    def take(self, nbytes: int) -> torch.Tensor:
        """So many bytes that nobody has, as a tensor of bytes; aligned as those of `empty`.

        EngineFailed where there is no room, or the arena is closed.
        """
        with self._lock:
            if self._memory is None:
                raise EngineFailed("the arena is closed")
            start = -(-self._used // self._alignment) * self._alignment
            if start + nbytes > self.nbytes:
                raise EngineFailed(
                    f"an arena of {self.nbytes} bytes has no room for {nbytes} more: "
                    f"{self._used} are taken",
                    "make a larger one",
                )
            self._memory.have(start + nbytes)
            self._used = start + nbytes
            return self._memory.tensor(start, nbytes)

    def descriptor(self) -> int:
        """A new file descriptor of all of its memory, which the caller closes.

        EngineFailed where there is none, or the arena was made of pieces.
        """
        with self._lock:
            if self._memory is None:
                raise EngineFailed("the arena is closed")
            return self._memory.descriptor()

    def close(self) -> None:
        """Gives no tensor any more. Memory of tensors that are in use stays until they are gone."""
        with self._lock:
            self._memory = None
            self._mark_closed()

    def _label(self) -> str:
        return f"of {self.nbytes} bytes on {self.device}"


def bytes_in_arena(device: torch.device | str, nbytes: int) -> torch.Tensor:
    """So many bytes in an arena that has nothing else; EngineFailed."""
    with Arena(device, nbytes) as arena:
        return arena.take(nbytes)


def bound(storage: torch.UntypedStorage, offset: int, like: torch.Tensor) -> torch.Tensor:
    """With the dtype, shape and strides of `like`, so many elements behind the storage's begin."""
    empty = torch.empty(0, dtype=like.dtype, device=storage.device)
    return empty.set_(storage, offset, like.size(), like.stride())


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda" or not torch.cuda.is_available():
        raise EngineFailed(f"there are no arenas on {device} here", "say cpu, or cuda")
    return torch.device("cuda", torch.cuda.current_device()) if device == _ANY_GPU else device


@plain_torch()
def arena_of(tensors: Mapping[str, torch.Tensor] | Iterable[torch.Tensor]) -> Arena:
    """Moves tensors into an arena of their device. They stay the same objects, such as the
    parameters of a module, with the same bytes, shapes and strides.

    Tensors that share memory, as tied weights and views do, share it afterwards. They are moved one
    after another, and the memory of each is freed at once, unless something else refers to it. So
    on the host no more memory is needed than the largest one takes. Neither is on a GPU, but for
    what torch's allocator cannot give back yet; if all of it has no room beside the tensors, the
    arena is made of pieces of 1 GiB, each of which has a descriptor. Nothing may use the tensors
    meanwhile.

    Args:
        tensors: Tensors of one device, by name or not. Those without elements stay as they are.

    Returns:
        The arena, which is full. Close it whenever you like: see `Arena`.

    Raises:
        TensorsUnusable: Tensors have no memory of their own, or lie on several devices.
        EngineFailed: There is not so much memory. Some tensors may have been moved.
    """
    some = list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)
    names = list(tensors) if isinstance(tensors, Mapping) else [f"{n}" for n in range(len(some))]
    device = next((one.device for one in some if one.numel()), torch.device("cpu"))
    problems = [
        f"{name}: {problem}"
        for name, tensor in zip(names, some, strict=True)
        if (problem := unusable(tensor) or _elsewhere(tensor, device))
    ]
    refuse_unusable(problems)
    blocks = _blocks_of(some)
    alignment = Arena.alignment_on(device)
    nbytes = sum([-(-block.nbytes // alignment) * alignment for block in blocks])
    arena = Arena(device, nbytes, piece_nbytes=_piece_nbytes(device, nbytes))
    try:
        while blocks:
            _move(blocks.pop(0), arena)
        wait_for([device])
    except BaseException:
        arena.close()
        raise
    return arena


def _elsewhere(tensor: torch.Tensor, device: torch.device) -> str:
    if tensor.device == device or not tensor.numel():
        return ""
    return f"is on {tensor.device}, others are on {device}: make an arena for each"


def _piece_nbytes(device: torch.device, nbytes: int) -> int | None:
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return PIECE_NBYTES if nbytes > free - PIECE_NBYTES else None


@dataclass
class _Block:
    """Bytes of a storage that tensors share."""

    start: int
    end: int
    tensors: list[torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def _blocks_of(tensors: Iterable[torch.Tensor]) -> list[_Block]:
    """Those that share bytes are in one block."""
    by_storage: dict[int, list[torch.Tensor]] = {}
    for tensor in {id(one): one for one in tensors if one.numel()}.values():
        by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    blocks: list[_Block] = []
    for some in by_storage.values():
        found: list[_Block] = []
        for tensor in sorted(some, key=_start):
            start, end = _start(tensor), _start(tensor) + tensor.nbytes
            if found and start < found[-1].end:
                found[-1].end = max(found[-1].end, end)
                found[-1].tensors.append(tensor)
            else:
                found.append(_Block(start, end, [tensor]))
        blocks += found
    for block in blocks:  # so that each of its tensors begins at one of its elements
        block.start -= block.start % max(one.itemsize for one in block.tensors)
    return blocks


def _start(tensor: torch.Tensor) -> int:
    """Where it begins in its storage, in bytes. It is dense."""
    return int(tensor.storage_offset()) * tensor.itemsize


def _move(block: _Block, arena: Arena) -> None:
    room = arena.take(block.nbytes)
    before = torch.empty(0, dtype=torch.uint8, device=arena.device)
    before.set_(block.tensors[0].untyped_storage(), block.start, (block.nbytes,))  # type: ignore[call-overload]
    room.copy_(before)
    for tensor in block.tensors:
        offset = (_start(tensor) - block.start) // tensor.itemsize
        tensor.data = bound(room.untyped_storage(), offset, tensor)
