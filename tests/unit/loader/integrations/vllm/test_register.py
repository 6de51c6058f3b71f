"""The entry point that vLLM calls in all of its processes."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

from engine_loader.integrations.vllm import register
from tests.support.checkout import ROOT


def test_the_distribution_names_it() -> None:
    table = '[project.entry-points."vllm.general_plugins"]\n'
    entry = (ROOT / "pyproject.toml").read_text("utf-8").partition(table)[2].partition("\n")[0]
    name, _, target = entry.partition(" = ")
    module, _, function = target.strip('"').partition(":")
    assert name == "engine_registry"
    assert getattr(import_module(module), function) is register


def test_importing_it_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, engine_loader.integrations.vllm;"
        "print([name for name in ('torch', 'vllm', 'mooncake', 'etcd3') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_where_vllm_is_not_or_is_another_it_warns_and_returns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    register()
    assert [one.levelno for one in caplog.records] == [logging.WARNING] * 2
    assert "ModuleNotFoundError" in caplog.text


class Factory:
    _registry: dict[str, Any] = {}  # noqa: RUF012
    calls = 0

    @classmethod
    def register_engine(cls, name: str, module: str, kind: str) -> None:
        if name in cls._registry:
            raise ValueError("registered already")
        cls._registry[name] = (module, kind)


def test_it_registers_once_however_often_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    loaders: dict[str, Any] = {"engine_registry": object}  # as after the first call
    package = ModuleType("vllm.model_executor.model_loader")
    vars(package).update(_LOAD_FORMAT_TO_MODEL_LOADER=loaders, register_model_loader=None)
    factory = ModuleType("vllm.distributed.weight_transfer.factory")
    vars(factory).update(WeightTransferEngineFactory=Factory)
    for name in ("vllm", "vllm.model_executor", "vllm.distributed"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(
        sys.modules, "vllm.distributed.weight_transfer", ModuleType("weight_transfer")
    )
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, factory.__name__, factory)
    register()
    register()
    assert Factory._registry == {
        "engine_registry": ("engine_loader.integrations.vllm.transfer", "RegistryTransfer")
    }
