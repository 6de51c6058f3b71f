"""Launches of the kernel, whose tables are kept: a load that is repeated makes the same copies.

A table takes Python a millisecond or more to make, in which the GPU would wait.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

import torch

from engine_loader.engines.cuda_ipc.launch import Launch, Launched
from engine_loader.engines.cuda_ipc.table import COLUMNS, Blocks, Copy, Numbers, table_of
from engine_loader.engines.cuda_ipc.tallies import Sums
from engine_loader.kernels.kernel import Kernel
from engine_loader.tensors.modes import plain_torch

KERNELS = {  # by the bytes of an element
    unit: Kernel(
        "engine_loader.engines.cuda_ipc.kernel", f"copy_rows_{unit}", (("COLUMNS", COLUMNS),)
    )
    for unit in (4, 2, 1)
}
_KEPT_NBYTES = 32 << 20  # of tables on GPUs: of some 200 GB of weights


class _Key(NamedTuple):
    gpu: int
    copies: tuple[Copy, ...]
    blocks: Blocks | None


class _Tables(NamedTuple):
    """Of one launch: on the GPU, by the bytes of an element. `added`: how many bytes go into each
    sum.
    """

    rows: dict[int, torch.Tensor]
    added: Numbers | None

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows.values())


class Launcher:
    """Begins launches. From one thread at a time."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Key, _Tables] = OrderedDict()  # those used last come last
        self._kept_nbytes = 0

    def launch(self, gpu: int, copies: Sequence[Copy], sums: Sums | None) -> Launch:
        stream = next(_streams(gpu))
        key = _Key(gpu, tuple(copies), sums.blocks if sums is not None else None)
        # What torch does to make another device or stream the current one takes longer than all
        # the rest.
        with nullcontext() if torch.cuda.current_device() == gpu else torch.cuda.device(gpu):
            if (tables := self._kept.get(key)) is None:
                tables = self._make(key)
            self._kept.move_to_end(key)
            for unit, rows in tables.rows.items():
                into = rows if sums is None else sums.memory
                KERNELS[unit].launch(stream, (len(rows), 1), rows, into)
            event = torch.cuda.Event()
            event.record(stream)
        launch = Launched(event, [tables, sums])
        if sums is not None and tables.added is not None:
            sums.add(launch, tables.added)
        return launch

    @plain_torch()
    def _make(self, key: _Key) -> _Tables:
        """They are on the GPU when this returns."""
        table, device = table_of(key.copies, key.blocks), torch.device("cuda", key.gpu)
        rows = {unit: torch.from_numpy(some).to(device) for unit, some in table.rows.items()}
        torch.cuda.current_stream().synchronize()
        added = table.added(len(key.blocks)) if key.blocks is not None else None
        tables = self._kept[key] = _Tables(rows, added)
        self._kept_nbytes += tables.nbytes
        while self._kept_nbytes > _KEPT_NBYTES and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._kept_nbytes -= oldest.nbytes
        return tables


def prepare(device: AbstractContextManager[Any]) -> None:
    """Loads the kernels, which may have to be compiled: not in the first load. A process that has
    not used a GPU yet does not begin to here.
    """
    with suppress(Exception), device, plain_torch():  # the first launch says what is wrong
        if torch.cuda.is_initialized():
            for kernel in KERNELS.values():
                kernel.prepare(torch.cuda.current_device())


@functools.cache
def _streams(gpu: int) -> Iterator[torch.cuda.Stream]:
    """Two in turns, so that a launch begins while the last rows of the one before are copied."""
    return itertools.cycle([torch.cuda.Stream(gpu), torch.cuda.Stream(gpu)])
