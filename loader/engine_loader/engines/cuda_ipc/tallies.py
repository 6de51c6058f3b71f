"""Sums of what is read: the memory that the kernel adds them up in, for digests."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine_loader.engines.cuda_ipc.launch import Launch
from engine_loader.engines.cuda_ipc.table import Blocks, Numbers
from engine_loader.tensors.cuda import wait_for
from engine_loader.tensors.modes import plain_torch
from engine_registry.schema.manifest import Region

_KEPT_BLOCKS = 8  # for the next load of the same


class Sums:
    """What the words of pieces of a source's memory sum up to, as they are read into a GPU."""

    @plain_torch()
    def __init__(self, blocks: Blocks, device: torch.device, close: Callable[[], object]) -> None:
        self.blocks = blocks
        self._close = close
        self.memory = torch.zeros(max(1, len(blocks)), dtype=torch.int64, device=device)
        self._nbytes = np.zeros(len(blocks), np.int64)  # that have gone into each sum
        self._launched: deque[tuple[Launch, Numbers]] = deque()  # and what each adds to that
        wait_for([device])

    @property
    def firsts(self) -> Numbers:
        return self.blocks.firsts

    def close(self) -> None:
        self._close()

    def add(self, launch: Launch, nbytes: Numbers) -> None:
        """So many bytes go into each sum, by a launch that has begun after all before it."""
        self._launched.append((launch, nbytes))

    def has_news(self) -> bool:
        return bool(self._launched) and self._launched[0][0].done()

    @plain_torch()
    def sums(self) -> tuple[Numbers, Numbers]:
        while self.has_news():
            _, nbytes = self._launched.popleft()
            self._nbytes = self._nbytes + nbytes
        return self.memory.cpu().numpy()[: len(self.blocks)], self._nbytes


class Tallies:
    """Of an engine: one at a time for each peer and GPU."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, int], Sums] = {}
        self._blocks: deque[tuple[Sequence[Region], Blocks]] = deque(maxlen=_KEPT_BLOCKS)

    def begin(
        self, peer: str, pieces: Sequence[Region], gpu: int, device: torch.device
    ) -> Sums | None:
        """None where there is one already."""
        key = peer, gpu
        with self._lock:
            if key in self._sums:
                return None
            sums = Sums(self._blocks_of(pieces), device, lambda: self._sums.pop(key, None))
            self._sums[key] = sums
            return sums

    def of(self, peer: str, gpu: int | None) -> Sums | None:
        return self._sums.get((peer, gpu)) if gpu is not None else None

    def _blocks_of(self, pieces: Sequence[Region]) -> Blocks:
        """Those that were made last are kept."""
        for known, blocks in self._blocks:
            if known is pieces:
                return blocks
        blocks = Blocks(pieces)
        self._blocks.append((pieces, blocks))
        return blocks
