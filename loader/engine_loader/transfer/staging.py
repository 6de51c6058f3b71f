"""Buffers for bytes that do not lie here as they lie at the source, and the copying from there to
their places.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from engine_loader.planning.boxes import Lines
from engine_loader.tensors.modes import plain_torch
from engine_registry.schema.manifest import Region


class Staging:
    """`count` buffers of `nbytes` bytes on the device of the tensors that are filled.

    One thread uses it.
    """

    @plain_torch()
    def __init__(
        self,
        tensors: Iterable[torch.Tensor],
        device: torch.device,
        count: int,
        nbytes: int,
        pinned: bool = False,
    ) -> None:
        """`pinned`: memory of the host's that CUDA copies from directly."""
        self._memory = torch.empty(
            count * nbytes, dtype=torch.uint8, device=device, pin_memory=pinned
        )
        self._device = device
        self.region = Region(self._memory.data_ptr(), self._memory.nbytes)
        self._idle = [self.region.addr + number * nbytes for number in range(count)]
        found = {
            (one.data_ptr(), one.nbytes()): one
            for one in [tensor.untyped_storage() for tensor in tensors if tensor.numel()]
        }
        self._starts: list[int] = []
        self._storages: list[
            torch.UntypedStorage
        ] = []  # the one that reaches furthest, of those that begin there or before
        end = 0
        for start, nbytes in sorted(found):
            if (
                start + nbytes > end
            ):  # else it lies inside another, as those may that are made of foreign memory
                end = start + nbytes
                self._starts.append(start)
                self._storages.append(found[start, nbytes])

    def take(self) -> int | None:
        """The address of a buffer that nobody uses; None if there is none."""
        return self._idle.pop() if self._idle else None

    def give_back(self, addr: int) -> None:
        self._idle.append(addr)

    @plain_torch()
    def copy(self, addr: int, lines: Sequence[Lines]) -> None:
        """From the buffer at `addr` to where the lines say. Done when this returns."""
        for some in itertools.chain.from_iterable(map(self._in_storages, lines)):
            place = self._place(some.dst)
            storage = self._storages[place]
            in_host = self._device.type == storage.device.type == "cpu"
            if in_host and not some.counts:
                ctypes.memmove(some.dst, addr + some.src, some.nbytes)
                continue
            shape = *some.counts, some.nbytes
            src = torch.as_strided(
                self._memory, shape, (*some.src_steps, 1), addr - self.region.addr + some.src
            )
            dst = torch.as_strided(
                _flat(storage), shape, (*some.dst_steps, 1), some.dst - self._starts[place]
            )
            if in_host:
                # torch's threads would spin afterwards, on the cores that the reads need
                np.copyto(dst.numpy(), src.numpy())
            else:
                dst.copy_(src)
        if self._device.type == "cuda":
            torch.cuda.current_stream(
                self._device
            ).synchronize()  # the buffer is read into again next

    def _place(self, addr: int) -> int:
        """The number of the storage that has the byte at the address."""
        return bisect.bisect_right(self._starts, addr) - 1

    def _in_storages(self, lines: Lines) -> Iterator[Lines]:
        """Lines that each lie in one storage. A run of bytes may cross those that are neighbours;
        lines with steps belong to one tensor.
        """
        if lines.counts:
            yield lines
            return
        at = 0
        while at < lines.nbytes:
            place = self._place(lines.dst + at)
            left = self._starts[place] + self._storages[place].nbytes() - (lines.dst + at)
            nbytes = min(left, lines.nbytes - at)
            yield lines._replace(src=lines.src + at, dst=lines.dst + at, nbytes=nbytes)
            at += nbytes


def _flat(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(
        storage, 0, (storage.nbytes(),), (1,)
    )
