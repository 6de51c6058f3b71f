"""A stand-in for vLLM's reload and for what a worker's transfer of weights imports of vLLM, with a
small model that only a right reload fills rightly.

As in vLLM, a module that is reloaded loses its weights, takes all new ones, and processes them into
the memory that it had before. One that gets only some of them has rubbish in the rest.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import nn

from tests.support.sglang import Group

Weights = Iterable[tuple[str, torch.Tensor]]
Init = TypeVar("Init")
Update = TypeVar("Update")
LAYERS, WIDTH = 3, 256
_RUBBISH, _PROCESSED = float("nan"), -2.0  # what the memory is multiplied with when it is processed


@dataclass
class Info:
    """How far the reload of a module is."""

    total: int | None = None
    load_numel: int = 0
    loaded: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def can_load(self) -> bool:
        return self.total is not None


class Linear(nn.Module):
    """So many parts of a checkpoint, fused, in memory that is multiplied with a number."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.zeros(parts, WIDTH, WIDTH), requires_grad=False)
        self.info = Info()

    def load(self, part: int, loaded: torch.Tensor) -> None:
        if not self.info.can_load():
            raise AssertionError("weights for a module whose reload has not begun, or has ended")
        self.info.loaded.append((part, loaded))  # kept until all are there, as vLLM does
        self.info.load_numel += loaded.numel()
        if self.info.load_numel >= (self.info.total or 0):
            self.process()

    def process(self) -> None:
        memory = torch.full_like(self.weight, _RUBBISH)
        for part, loaded in self.info.loaded:
            memory[part] = loaded
        self.weight.data.copy_(memory * _PROCESSED)
        self.info = Info()

    def raw(self) -> torch.Tensor:
        """Its weights as a checkpoint has them."""
        return self.weight.data / _PROCESSED


class Model(nn.Module):
    """Each layer has two parts that are fused, and another. `calls` are the names of each call of
    `load_weights`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = Linear(1), Linear(1)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qk": Linear(2), "down": Linear(1)}) for _ in range(LAYERS)
        )
        self.calls: list[list[str]] = []
        self.fails = ""  # at the weights of this name

    def load_weights(self, weights: Weights) -> set[str]:
        names: list[str] = []
        self.calls.append(names)
        loaded = set()
        for name, tensor in weights:
            if name == self.fails:
                raise RuntimeError(f"no memory for {name}")
            names.append(name)
            module, part = self.place(name)
            self.get_submodule(module).load(part, tensor)  # type: ignore[operator]
            loaded.add(f"{module}.weight")
        return loaded

    @staticmethod
    def place(name: str) -> tuple[str, int]:
        """The module that takes a tensor of the checkpoint, and as which part."""
        before, _, leaf = name.rpartition(".")
        return (f"{before}.qk", "qk".index(leaf)) if leaf in ("q", "k") else (name, 0)

    def holds(self, checkpoint: Mapping[str, torch.Tensor]) -> bool:
        """Whether it computes with these weights."""
        for name, tensor in checkpoint.items():
            module, part = self.place(name)
            if not torch.equal(self.get_submodule(module).raw()[part], tensor):  # type: ignore[operator]
                return False
        return True


def checkpoint() -> dict[str, torch.Tensor]:
    names = ["embed", "head"]
    names += [f"layers.{layer}.{leaf}" for layer in range(LAYERS) for leaf in ("q", "k", "down")]
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(WIDTH, WIDTH, generator=random) for name in names}


def initialize_layerwise_reload(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Linear) and not module.info.can_load():
            module.info = Info(module.weight.numel())


def finalize_layerwise_reload(model: nn.Module, _: object) -> None:
    for module in model.modules():
        if isinstance(module, Linear) and module.info.can_load():
            if module.info.load_numel:
                module.process()
            module.info = Info()  # what got nothing has what it had


def get_layerwise_info(module: nn.Module) -> Any:
    return module.info if isinstance(module, Linear) else Info()


class WeightTransferEngine(Generic[Init, Update]):
    def __init__(self, config: object, vllm_config: Any, device: torch.device, model: Any) -> None:
        self.vllm_config, self.device, self.model = vllm_config, device, model
        self.model_config = vllm_config.model_config


class WorkerBase:
    """With the methods by which weights become others."""

    def __init__(self, transfer: Any) -> None:
        self.weight_transfer_engine = transfer

    def sleep(self, level: int = 1) -> None:
        pass

    def reload_weights(self) -> None:
        pass


def install(monkeypatch: pytest.MonkeyPatch) -> type[WorkerBase]:
    """Puts the stand-ins where vLLM's modules are; the class of the workers."""

    class Worker(WorkerBase):
        def sleep(self, level: int = 1) -> None:
            pass

        def reload_weights(self) -> None:
            for module in self.weight_transfer_engine.model.modules():
                if isinstance(module, Linear):
                    module.weight.data.fill_(1.0)

    reload = "vllm.model_executor.model_loader.reload"
    state = SimpleNamespace(get_world_group=Group)
    modules: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.distributed": {"parallel_state": state},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.base": {
            "WeightTransferEngine": WeightTransferEngine,
            "WeightTransferInitInfo": object,
            "WeightTransferUpdateInfo": object,
        },
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {},
        reload: {
            "initialize_layerwise_reload": initialize_layerwise_reload,
            "finalize_layerwise_reload": finalize_layerwise_reload,
        },
        f"{reload}.layerwise": {"get_layerwise_info": get_layerwise_info},
        "vllm.v1": {},
        "vllm.v1.worker": {},
        "vllm.v1.worker.gpu_worker": {"Worker": Worker},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        module.__path__ = []  # a package
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("calls", "handing", "transfer"):  # they are imported anew, with the stand-ins
        monkeypatch.delitem(sys.modules, f"engine_loader.integrations.vllm.{name}", raising=False)
    return Worker
