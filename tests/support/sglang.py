"""A small stand-in for SGLang: its registry of hooks, and its context of one process."""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn


class HookRegistry:
    """Remembers what is registered, and applies nothing."""

    _hooks: dict[str, list[Any]]
    _patched: set[str]

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], kind: str) -> None:
        cls._hooks.setdefault(target, []).append((kind, hook, None))

    @classmethod
    def apply_hooks(cls) -> None:
        cls._patched.update(cls._hooks)


class LoadFormat(str, enum.Enum):
    AUTO = "auto"
    PT = "pt"
    SAFETENSORS = "safetensors"
    NPCACHE = "npcache"
    MISTRAL = "mistral"
    PRIVATE = "private"


@dataclass
class LoadConfig:
    load_format: LoadFormat = LoadFormat.PRIVATE
    model_loader_extra_config: dict[str, Any] = field(default_factory=dict)


class Group:
    """One rank of a tensor-parallel group that another has given what it said."""

    def __init__(self, rank: int = 0, size: int = 1, said: object = None) -> None:
        self.rank_in_group = rank
        self.world_size = size
        self.cpu_group = None
        self.said = said

    def broadcast_object(self, value: object, src: int) -> object:
        if self.rank_in_group == src:
            self.said = value
        return self.said


class Process:
    """What SGLang knows in a process."""

    def __init__(self) -> None:
        self.parallel = SimpleNamespace(
            tp_rank=0,
            tp_size=1,
            pp_rank=0,
            pp_size=1,
            tp_group=Group(),
            world_group=Group(),
            moe_dense_tp_size=None,
            enable_dp_lm_head=False,
        )
        self.model = SimpleNamespace(
            load_format="auto",
            model_loader_extra_config="{}",
            model_path="/models/llama",
            revision=None,
            quantization=None,
        )
        self.exec = SimpleNamespace(
            features=SimpleNamespace(
                enable_weights_cpu_backup=False,
                enable_fp32_lm_head=False,
                enable_memory_saver=False,
            ),
            moe=SimpleNamespace(
                enable_eplb=False, ep_num_redundant_experts=0, init_expert_location="trivial"
            ),
        )
        self.calls: list[str] = []
        self.post_process: Callable[[nn.Module], None] = lambda _: None

    def loader(self) -> type:
        """SGLang's loader of checkpoints, whose weights are all 3."""
        process = self

        class DefaultModelLoader:
            def __init__(self, load_config: LoadConfig) -> None:
                self.load_config = load_config

            def _get_all_weights(self, *_: object) -> str:
                config = self.load_config
                return f"read {config.load_format.value} {config.model_loader_extra_config}"

            @staticmethod
            def load_weights_only(model: nn.Module, weights: str, _: object) -> None:
                process.calls.append(weights)
                for parameter in model.parameters():
                    parameter.data.fill_(3.0)

            @staticmethod
            def postprocess_weights(model: nn.Module, _: object) -> None:
                process.calls.append("post-process")
                process.post_process(model)

            @staticmethod
            def restore_weights_before_loading(*_: object) -> None:
                process.calls.append("restore")

            def load_weights_and_postprocess(
                self, model: nn.Module, weights: str, device: object
            ) -> None:
                self.load_weights_only(model, weights, device)
                self.postprocess_weights(model, device)

        return DefaultModelLoader


def install(monkeypatch: pytest.MonkeyPatch) -> Process:
    """Puts stand-ins where SGLang's modules are, as far as ours import them."""
    process = Process()
    HookRegistry._hooks, HookRegistry._patched = {}, set()
    modules: dict[str, dict[str, Any]] = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.plugins": {},
        "sglang.srt.plugins.hook_registry": {
            "HookRegistry": HookRegistry,
            "HookType": SimpleNamespace(AROUND="around", BEFORE="before"),
        },
        "sglang.srt.configs": {},
        "sglang.srt.environ": {
            "envs": SimpleNamespace(MOONCAKE_PROTOCOL=SimpleNamespace(get=lambda: "tcp"))
        },
        "sglang.srt.configs.load_config": {"LoadConfig": LoadConfig, "LoadFormat": LoadFormat},
        "sglang.srt.model_loader": {},
        "sglang.srt.model_loader.loader": {
            "DefaultModelLoader": process.loader(),
            "_get_quantization_config": lambda *_: None,
            "_initialize_model": lambda *_: nn.Linear(4, 2),
        },
        "sglang.srt.model_loader.utils": {"set_default_torch_dtype": lambda _: nullcontext()},
        "sglang.srt.runtime_context": {
            "get_parallel": lambda: process.parallel,
            "get_model": lambda: process.model,
            "get_exec": lambda: process.exec,
        },
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        module.__path__ = []  # a package
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return process


def forget_ours() -> None:
    """The next test imports them anew, with a stand-in for itself."""
    for name in ("bootstrap", "identity", "loader", "pulling", "updates"):
        sys.modules.pop(f"engine_loader.integrations.sglang.{name}", None)
