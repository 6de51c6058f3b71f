"""Changes of the weights of a running SGLang: peers never get half of one."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.sglang import HookRegistry, Process

WEIGHTS = {"w": torch.zeros(3)}
RUNNER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"


class Served:
    """Writes down what is asked of it."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def pause(self) -> None:
        self.done.append("pause")

    def resume(self) -> None:
        self.done.append("resume")

    def replace(self, tensors: Mapping[str, torch.Tensor]) -> None:
        assert tensors is WEIGHTS
        self.done.append("replace")

    def close(self) -> None:
        self.done.append("close")


class Running:
    """A served model of SGLang, whose methods run through our hooks."""

    def __init__(self, tensors: Mapping[str, torch.Tensor] | None = WEIGHTS) -> None:
        self.updates: Any = importlib.import_module("engine_loader.integrations.sglang.updates")
        self.updates.hook_updates()
        self.model = nn.Linear(1, 1)
        self.served = Served()
        self.updates.follow_updates(self.model, self.updates.Changes(self.served, lambda: tensors))

    def call(
        self, method: str, original: Callable[..., object] = lambda *_: None, *, of: str = RUNNER
    ) -> object:
        ((_, hook, _),) = HookRegistry._hooks[f"{of}.{method}"]
        updater = SimpleNamespace(get_model=lambda: self.model)
        return hook(original, updater, *([SimpleNamespace(tags=None)] if of is MANAGER else []))


def succeeds(*_: object) -> tuple[bool, str]:
    return True, "Success"


def fails(*_: object) -> tuple[bool, str]:
    return False, "no"


def raises(*_: object) -> None:
    raise RuntimeError("no")


@pytest.fixture
def running(sglang: Process) -> Running:
    return Running()


def test_a_session_pauses_once_and_serves_the_new_weights_at_its_end(running: Running) -> None:
    running.call("begin_weight_update")
    running.call("update_weights_from_tensor", succeeds)
    running.call("load_weights_from_distributed", succeeds)
    assert running.served.done == ["pause"]
    running.call("end_weight_update")
    assert running.served.done == ["pause", "replace"]


def test_peers_wait_before_the_first_byte_changes(running: Running) -> None:
    seen: list[list[str]] = []
    running.call("begin_weight_update", lambda *_: seen.append([*running.served.done]))
    assert seen == [["pause"]]


@pytest.mark.parametrize("method", ["update_weights_from_disk", "update_weights_from_ipc"])
def test_an_update_for_itself_is_a_session(running: Running, method: str) -> None:
    assert running.call(method, succeeds) == (True, "Success")
    assert running.served.done == ["pause", "replace"]


def test_after_a_change_that_failed_peers_wait_until_one_succeeds(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        running.call("update_weights_from_disk", fails)
    assert running.served.done == ["pause"]
    (line,) = caplog.messages
    assert line.startswith("peers do not get these weights until an update of them succeeds")
    running.call("update_weights_from_disk", succeeds)
    assert running.served.done == ["pause", "pause", "replace"]


def test_a_change_that_raises_fails_and_the_error_passes_through(running: Running) -> None:
    running.call("begin_weight_update")
    with pytest.raises(RuntimeError, match="no"):
        running.call("update_weights_from_tensor", raises)
    running.call("end_weight_update")
    assert running.served.done == ["pause"]


def test_a_pull_that_fails_is_an_answer_and_not_the_end_of_sglang(running: Running) -> None:
    pulling = importlib.import_module("engine_loader.integrations.sglang.pulling")

    def pull(*_: object) -> None:
        raise pulling.PullFailed("rank 1: no source", "pull again")

    answer = running.call("update_weights_from_tensor", pull)
    assert answer == (False, "rank 1: no source: pull again")
    assert running.served.done == ["pause"]


def test_weights_that_post_processing_has_moved_are_served_no_more(
    sglang: Process, caplog: pytest.LogCaptureFixture
) -> None:
    running = Running(tensors=None)
    with caplog.at_level(logging.WARNING):
        running.call("update_weights_from_disk", succeeds)
        running.call("update_weights_from_disk", succeeds)
        running.call("release_memory_occupation", of=MANAGER)
    assert running.served.done == ["pause", "close"]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("has_backup", "done"), [(True, ["pause", "resume"]), (False, ["pause"])])
def test_memory_that_comes_back_is_served_if_it_has_the_same_bytes(
    sglang: Process, running: Running, has_backup: bool, done: list[str]
) -> None:
    sglang.exec.features.enable_weights_cpu_backup = has_backup
    running.call("release_memory_occupation", of=MANAGER)
    running.call("resume_memory_occupation", of=MANAGER)
    assert running.served.done == done


def test_memory_of_the_cache_alone_is_not_of_the_weights(running: Running) -> None:
    ((_, hook, _),) = HookRegistry._hooks[f"{MANAGER}.release_memory_occupation"]
    hook(lambda *_: None, None, SimpleNamespace(tags=["kv_cache"]))
    assert running.served.done == []


def test_other_models_of_the_process_are_left_alone(running: Running) -> None:
    running.model = nn.Linear(1, 1)
    assert running.call("update_weights_from_disk", succeeds) == (True, "Success")
    running.call("begin_weight_update")
    running.call("end_weight_update")
    assert running.served.done == []


def test_the_hooks_count_once_sglang_has_applied_all_of_them(running: Running) -> None:
    assert not running.updates.updates_are_hooked()
    HookRegistry.apply_hooks()
    assert running.updates.updates_are_hooked()
    HookRegistry._patched.remove(f"{RUNNER}.update_weights_from_ipc")
    assert not running.updates.updates_are_hooked()
