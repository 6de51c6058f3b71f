"""All kernels that are kept in files, compiled before a load needs them. Called by `engines warm`.

Those of `deltas` are not among them: Triton launches these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine_loader.digests import sums
from engine_loader.engines.cuda_ipc import launcher
from engine_loader.kernels.kernel import Kernel, arch_of

KERNELS: tuple[Kernel, ...] = (*launcher.KERNELS.values(), sums.KERNEL)


@dataclass(frozen=True)
class Warmed:
    """A kernel that is kept for a kind of GPU.

    Attributes:
        kernel: Its name.
        arch: Of the GPUs: 90 for sm_90.
        path: Where it is kept.
        compiled: Whether it had to be compiled now.
    """

    kernel: str
    arch: int
    path: Path
    compiled: bool


def archs_here() -> list[int]:
    """The kinds of GPU that this process sees, each once."""
    if torch.version.hip or not torch.cuda.is_available():
        return []
    return sorted({arch_of(gpu) for gpu in range(torch.cuda.device_count())})


def warm(archs: Iterable[int]) -> Iterator[Warmed]:
    """Compiles each kernel for each kind of GPU, unless it is kept already.

    Args:
        archs: Kinds of GPU: 90 for sm_90. They need not be here.

    Returns:
        Each kernel as soon as it is kept.

    Raises:
        EngineFailed: A kernel cannot be compiled, or its file cannot be written.
    """
    for arch in archs:
        for kernel in KERNELS:
            compiled = kernel.keep(arch)
            yield Warmed(kernel.name, arch, kernel.path(arch), compiled)
