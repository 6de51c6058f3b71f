"""Whether the memory that a model computes with can be served, after vLLM has post-processed it.

It can where all that post-processing makes of the weights is in tensors of the module. Kernels that
keep weights in handles of their own, and numbers that methods of quantisation keep in Python, are
not copied with the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from engine_loader.integrations.tensors import runtime_tensors

SKIPPED = ("kv_cache",)


def served_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors that the model computes with, but for its KV cache."""
    return runtime_tensors(module, skip=SKIPPED)


class Unprocessed:
    """A model before its post-processing, to compare with."""

    def __init__(self, module: nn.Module) -> None:
        self._filled = {name for name, one in module.named_parameters() if one.numel()}
        self._numbers = dict(_numbers(module))

    def lost(self, module: nn.Module) -> list[str]:
        """What post-processing has put where no tensor shows it, by name; empty where nothing."""
        now = dict(module.named_parameters())
        moved = [name for name in self._filled if name in now and not now[name].numel()]
        moved += [name for name in self._filled - set(now) if not _has_tensors(module, name)]
        numbers = [
            name for name, value in _numbers(module) if self._numbers.get(name, value) != value
        ]
        return sorted(moved) + sorted(numbers)


def _has_tensors(module: nn.Module, name: str) -> bool:
    """Whether the owner of a parameter that is gone has another tensor in its place."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return any(tensor.numel() for tensor in served_tensors(owner).values())


def _numbers(module: nn.Module) -> Iterator[tuple[str, float]]:
    for prefix, part in module.named_modules():
        owners: list[tuple[str, Mapping[str, object]]] = [(prefix, vars(part))]
        method = getattr(part, "quant_method", None)
        owners.append((f"{prefix}!quant_method", getattr(method, "__dict__", {})))
        for path, values in owners:
            for leaf, value in values.items():
                if isinstance(value, float):
                    yield f"{path}!{leaf}", value
