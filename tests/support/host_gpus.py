"""The host's memory in the place of GPUs, and the kernel of cuda_ipc run by Triton's interpreter.

So what the engine does with reads is tested where there is no GPU. Only sources of this process can
be read from: no memory of another one is mapped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine_loader.engines.cuda_ipc.gpus import Launch, Made, Sums
from engine_loader.engines.cuda_ipc.table import Copy, table_of
from engine_loader.errors import EngineFailed
from engine_registry.schema.manifest import Export
from tests.support.interpreted import interpreted

KERNEL = "engine_loader.engines.cuda_ipc.kernel"
_END = 1 << 47


class HostGpus:
    """One, numbered 0, whose memory is the host's."""

    def gpu_of(self, addr: int) -> int | None:
        return 0

    def number_of(self, device: torch.device) -> int | None:
        return 0

    def current(self) -> int:
        return 0

    def export(self, addr: int) -> Export:
        return Export(0, _END, b"host")

    def open(self, handle: bytes, gpu: int) -> int:
        raise EngineFailed("no memory of other processes is here")

    def close(self, addr: int, gpu: int) -> None:
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
            sums.nbytes += table.added(len(sums.blocks))
        return Made()
