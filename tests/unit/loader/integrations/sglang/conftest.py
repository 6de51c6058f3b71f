"""SGLang's modules, as far as ours import them, made of stand-ins."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.sglang import HookRegistry, Process


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
            "HookType": SimpleNamespace(AROUND="around"),
        },
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
