"""SGLang's modules, as far as ours import them, made of stand-ins."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tests.support.sglang import HookRegistry, LoadConfig, LoadFormat, Process


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
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
    _forget_ours()
    yield process
    _forget_ours()


def _forget_ours() -> None:
    """The next test imports them anew, with a stand-in for itself."""
    for name in ("bootstrap", "identity", "loader", "pulling", "updates"):
        sys.modules.pop(f"engine_loader.integrations.sglang.{name}", None)
