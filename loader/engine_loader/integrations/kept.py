"""The weights as they were loaded, while the engine post-processes them: the same memory, and proof
that the bytes are still the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from engine_loader.digests.table import algorithm_for, digests_of
from engine_loader.integrations.tensors import aliases, memory_of, runtime_tensors


class Kept:
    """Post-processing may replace the tensors of the module, move them, or write to them in place.

    The first two cost memory, for as long as this lives. After the third the bytes are lost.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Reads all bytes once."""
        self.tensors = aliases(tensors)
        self._digests = self._digest()

    def changed(self) -> list[str]:
        """The names of the tensors whose bytes have changed since. Reads all bytes once."""
        now = self._digest()
        return sorted(name for name, digest in self._digests.items() if digest != now[name])

    def extra_nbytes(self, module: nn.Module) -> int:
        """Bytes that the module does not use any more."""
        used = memory_of(runtime_tensors(module).values())
        return sum(
            tensor.nbytes
            for tensor in self.tensors.values()
            if tensor.numel() and tensor.untyped_storage().data_ptr() not in used
        )

    def _digest(self) -> dict[str, bytes]:
        by_algorithm: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            by_algorithm.setdefault(algorithm_for(tensor.device), {})[name] = tensor
        return {
            name: digest
            for algorithm, tensors in by_algorithm.items()
            for name, digest in digests_of(tensors, algorithm).items()
        }
