"""What the engine needs of CUDA: which GPU has what, memory of other processes, and launches of the
kernel. `memory` says how memory is shared.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from engine_loader.engines.cuda_ipc.launch import Launch, Made
from engine_loader.engines.cuda_ipc.launcher import KERNELS, Launcher, prepare
from engine_loader.engines.cuda_ipc.table import Copy
from engine_loader.engines.cuda_ipc.tallies import Sums
from engine_loader.errors import EngineUnavailable
from engine_loader.kernels.kernel import can_be_had
from engine_loader.sharing.memory import SharedMemory
from engine_loader.sharing.offers import Memory
from engine_loader.tensors.cuda import check, device_here, device_of
from engine_loader.tensors.cuda_memory import calls, on_gpu
from engine_loader.tensors.modes import plain_torch
from engine_registry.schema.manifest import Export

_PEER_ACCESS_ENABLED = 704  # CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED: torch has done it


class Gpus(Memory, Protocol):
    """Where the engine reads from and to. GPUs are given by their numbers."""

    def gpu_of(self, addr: int) -> int | None:
        """The GPU that has the memory; None where the host has it."""

    def number_of(self, device: torch.device) -> int | None:
        """Of a GPU; None where it is none."""

    def current(self) -> int:
        """The calling thread's GPU."""

    def can_be_shared(self, addr: int) -> bool:
        """Whether other processes can open the memory there."""

    def open(self, export: Export, gpu: int) -> int:
        """Where that GPU has another process's allocations from now on.

        EngineFailed where the process, or its keeper, has ended, the GPU does not reach its memory,
        or there is less of it than the export says.
        """

    def close(self, addr: int, gpu: int) -> None:
        """Ends one `open`."""

    def pin(self, addr: int, start: int, nbytes: int, gpu: int) -> None:
        """Lets the GPU read bytes of the host's memory that was opened at that address. They begin
        so many bytes behind it. EngineFailed where they cannot be pinned.
        """

    def reach(self, addr: int, nbytes: int, gpu: int) -> int:
        """Where that GPU can read so many bytes of this process from now on.

        EngineFailed where there is no way between the two GPUs, or the memory is the host's and
        cannot be pinned.
        """

    def launch(self, gpu: int | None, copies: Sequence[Copy], sums: Sums | None) -> Launch:
        """Begins the copies, on that GPU; into memory of the host (None) they are made at once."""


class CudaGpus(SharedMemory):
    """The GPUs that this process sees."""

    def __init__(self) -> None:
        """EngineUnavailable where there are none, or neither kernels nor Triton."""
        super().__init__()
        if not torch.cuda.is_available():
            raise EngineUnavailable(
                "no GPU of CUDA can be used here", "use tcp or rdma; see engines doctor"
            )
        if not can_be_had(KERNELS.values(), 0):
            raise EngineUnavailable(
                "the kernels of cuda_ipc are not compiled, and Triton is not installed",
                "pip install triton, or run `engines warm` where it is; or use nvlink_intra",
            )
        threading.Thread(
            target=prepare, args=(device_here(),), name="kernel of cuda_ipc", daemon=True
        ).start()
        self._launcher = Launcher()
        self._reached: set[tuple[int, int]] = set()  # GPUs, and those whose memory they reach

    def gpu_of(self, addr: int) -> int | None:
        return device_of(addr)

    def number_of(self, device: torch.device) -> int | None:
        if device.type != "cuda":
            return None
        return self.current() if device.index is None else device.index

    def current(self) -> int:
        return torch.cuda.current_device()

    @plain_torch()
    def reach(self, addr: int, nbytes: int, gpu: int) -> int:
        other = device_of(addr)
        if other is None:
            return self.pinned(addr, nbytes, gpu)
        if other == gpu or (gpu, other) in self._reached:
            return addr
        with on_gpu(other) as memory, on_gpu(gpu):
            code = calls().cuCtxEnablePeerAccess(memory, 0)
            if code != _PEER_ACCESS_ENABLED:
                check(code, f"cuda:{gpu} does not reach cuda:{other} (nvidia-smi topo -p2p r)")
        # By a copy, torch lets that GPU reach expandable segments as well, and those to come.
        there = torch.zeros(1, device=torch.device("cuda", other))
        there.to(torch.device("cuda", gpu))
        self._reached.add((gpu, other))
        return addr

    def launch(self, gpu: int | None, copies: Sequence[Copy], sums: Sums | None) -> Launch:
        if gpu is not None:
            return self._launcher.launch(gpu, copies, sums)
        with on_gpu(self.current()):
            for copy in copies:
                _to_host(copy)
        return Made()


def _to_host(copy: Copy) -> None:
    lines = [copy.lines] if copy.lines is not None else []
    runs = [
        (copy.src + run.src, copy.dst + run.dst, run.nbytes)
        for some in lines
        for run in some.along(len(some.counts))
    ] or [(copy.src, copy.dst, copy.nbytes)]
    on_host = device_of(copy.src) is None
    for src, dst, nbytes in runs:
        if on_host:
            ctypes.memmove(dst, src, nbytes)
            continue
        check(
            calls().cuMemcpyDtoH_v2(
                ctypes.c_void_p(dst), ctypes.c_uint64(src), ctypes.c_size_t(nbytes)
            ),
            "the memory of the GPU cannot be copied to the host's",
        )
