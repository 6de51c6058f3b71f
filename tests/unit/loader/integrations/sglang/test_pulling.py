"""What a pull takes from its order and from the settings, and how the group ends."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch
from torch import nn

from engine_loader.integrations.sglang import request
from engine_loader.integrations.sglang.order import Order
from engine_registry.errors import InvalidField
from tests.support.sglang import Process


@pytest.fixture
def pulling(sglang: Process) -> Any:
    return importlib.import_module("engine_loader.integrations.sglang.pulling")


def test_tensors_that_are_no_request_are_a_failed_pull(pulling: Any) -> None:
    with pytest.raises(pulling.PullFailed, match="1 of 1 ranks could not pull") as caught:
        pulling.pull_into(nn.Linear(1, 1), [("w", torch.zeros(1))])
    assert "the request to pull weights is not valid" in str(caught.value)


def test_pipeline_stages_need_a_version(sglang: Process, pulling: Any) -> None:
    sglang.parallel.pp_size = 2
    with pytest.raises(pulling.PullFailed, match="give the number of a `version` to `request`"):
        pulling.pull_into(nn.Linear(1, 1), request("trainer"))


@pytest.mark.parametrize(
    "written", [{"etcd": "a:1", "model": "m"}, '{"etcd": "a:1", "model": "m"}']
)
def test_settings_of_the_start_hold_unless_the_request_has_others(
    sglang: Process, pulling: Any, written: object
) -> None:
    sglang.model.load_format = "private"
    sglang.model.model_loader_extra_config = written
    config = pulling.settings_of(Order("trainer", settings={"etcd": "b:2"}))
    assert (config.etcd, config.model) == ("b:2", "m")


def test_settings_of_the_environment_hold_for_other_load_formats(
    sglang: Process, pulling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_REGISTRY", json.dumps({"etcd": "c:3"}))
    assert pulling.settings_of(Order("trainer")).etcd == "c:3"
    monkeypatch.setenv("ENGINE_REGISTRY", "etcd=c:3")
    with pytest.raises(InvalidField, match="ENGINE_REGISTRY is no JSON"):
        pulling.settings_of(Order("trainer"))
