"""Copies many tensors at once. Called by the thread of a trainer, which waits for it.

torch copies one tensor with all of its threads and waits for each of them, tensor by tensor. Where
other processes use the cores, one late thread delays every tensor. Here threads take pieces of all
tensors, and they are awaited once; they end before `copy` returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine_loader.digests.table import THREADS
from engine_loader.tensors.modes import plain_torch

_PIECE_NBYTES = 4 << 20
_Piece = tuple[npt.NDArray[Any], npt.NDArray[Any]]  # to, from


@plain_torch()
def copy(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """From the first of each pair to the second: bytes in a row, as many in both.

    Copies from or to a GPU may go on when this returns.
    """
    pieces: deque[_Piece] = deque()
    for source, to in pairs:
        if source.is_cpu and to.is_cpu:
            theirs, ours = source.numpy(), to.numpy()
            for at in range(0, len(theirs), _PIECE_NBYTES):
                end = at + _PIECE_NBYTES
                pieces.append((ours[at:end], theirs[at:end]))
        else:
            to.copy_(source, non_blocking=True)
    threads = min(THREADS, len(pieces))
    if threads <= 1:
        _copy(pieces)
        return
    with ThreadPoolExecutor(threads - 1, "copies") as pool:
        others = [pool.submit(_copy, pieces) for _ in range(threads - 1)]
        _copy(pieces)
        for other in others:
            other.result()


def _copy(pieces: deque[_Piece]) -> None:
    """Until none is left."""
    while True:
        try:
            to, source = pieces.popleft()
        except IndexError:
            return
        np.copyto(to, source)
