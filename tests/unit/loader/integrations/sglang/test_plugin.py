"""The entry point that SGLang calls: lazy, repeatable, and harmless."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import pytest

from engine_loader.integrations.sglang import register
from engine_loader.integrations.sglang.plugin import PrivateLoader
from tests.support.checkout import ROOT
from tests.support.sglang import HookRegistry, Process

SCHEDULER = "sglang.srt.managers.scheduler"
PRIVATE = "sglang.private.private_model_loader"


@pytest.fixture(autouse=True)
def _no_finder_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.delenv("ENGINE_REGISTRY", raising=False)


def finders() -> int:
    return sum(isinstance(finder, PrivateLoader) for finder in sys.meta_path)


def test_registering_imports_neither_torch_nor_sglang() -> None:
    program = (
        "import sys\n"
        "from engine_loader.integrations.sglang import register\n"
        "register(); register()\n"
        "print(sorted({'torch', 'sglang', 'grpc'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert (printed.stdout, printed.stderr) == ("[]\n", "")


def test_the_entry_point_is_stated() -> None:
    stated = (ROOT / "pyproject.toml").read_text()
    group = stated.partition('[project.entry-points."sglang.srt.plugins"]\n')[2]
    assert group.startswith('engine_registry = "engine_loader.integrations.sglang:register"\n')


def test_registering_again_changes_nothing(sglang: Process) -> None:
    register()
    register()
    assert finders() == 1
    assert find_spec(PRIVATE) is not None


def test_a_private_build_of_sglang_keeps_its_loader(
    sglang: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = ModuleType(PRIVATE)
    monkeypatch.setitem(sys.modules, "sglang.private", ModuleType("sglang.private"))
    monkeypatch.setitem(sys.modules, PRIVATE, theirs)
    register()
    assert importlib.import_module(PRIVATE) is theirs


@pytest.fixture
def scheduler(sglang: Process, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The process is a scheduler of SGLang: what it does when it makes its model."""
    module = ModuleType(SCHEDULER)
    module.__dict__["Scheduler"] = type("Scheduler", (), {"init_model_worker": None})
    monkeypatch.setitem(sys.modules, SCHEDULER, module)

    def make_model() -> None:
        for _, hook, _ in HookRegistry._hooks.get(f"{SCHEDULER}.Scheduler.init_model_worker", ()):
            hook()

    return make_model


def hooked() -> set[str]:
    return {target.rpartition(".")[2] for target in HookRegistry._patched}


def test_a_process_without_weights_is_not_hooked(
    sglang: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_REGISTRY", "{}")
    register()
    assert HookRegistry._hooks == {}


def test_another_release_of_sglang_is_left_alone(
    sglang: Process, scheduler: Callable[[], None]
) -> None:
    del sys.modules[SCHEDULER].Scheduler.init_model_worker
    register()
    assert HookRegistry._hooks == {}


def test_a_scheduler_is_hooked_once_it_makes_its_model(scheduler: Callable[[], None]) -> None:
    register()
    register()
    assert hooked() == set()
    scheduler()
    scheduler()
    assert hooked() - {"init_model_worker"} == {
        "begin_weight_update",
        "end_weight_update",
        "update_weights_from_tensor",
        "load_weights_from_distributed",
        "update_weights_from_disk",
        "update_weights_from_ipc",
        "release_memory_occupation",
        "resume_memory_occupation",
    }
    assert {len(hooks) for hooks in HookRegistry._hooks.values()} == {1}


def test_settings_in_the_environment_hook_the_transfer(
    scheduler: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_REGISTRY", '{"etcd": "10.0.0.5:2379"}')
    register()
    scheduler()
    assert "_register_to_engine_info_bootstrap" in hooked()


@pytest.mark.parametrize("settings", ["etcd=10.0.0.5:2379", '{"etdc": "10.0.0.5:2379"}'])
def test_settings_that_are_not_valid_are_one_warning_and_updates_are_followed_all_the_same(
    scheduler: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    settings: str,
) -> None:
    monkeypatch.setenv("ENGINE_REGISTRY", settings)
    register()
    with caplog.at_level(logging.WARNING):
        scheduler()
    (line,) = caplog.messages
    assert line.startswith("engine_registry is not used in SGLang: ")
    assert "begin_weight_update" in hooked()
    assert "_register_to_engine_info_bootstrap" not in hooked()


def test_what_fails_is_one_warning(
    scheduler: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", None)
    with caplog.at_level(logging.WARNING):
        register()
    (line,) = caplog.messages
    assert line.startswith("engine_registry is not used in SGLang: ")
