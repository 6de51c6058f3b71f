"""The ranks of a group pull one content, and end in the same way."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from engine_loader.errors import LoaderError
from engine_loader.integrations.sglang import request
from engine_loader.integrations.sglang.order import Order
from engine_registry.errors import InvalidField
from tests.support.sglang import Group, Process

CONTENTS = ("a" * 32, "b" * 32)


class Catalogue:
    """Of a source that has gone on since."""

    def __init__(self, contents: Sequence[str] | None) -> None:
        self.contents = CONTENTS if contents is None else tuple(contents)
        self.was_asked_for = contents


@pytest.fixture
def pulling(sglang: Process) -> Any:
    return importlib.import_module("engine_loader.integrations.sglang.pulling")


def test_the_first_rank_chooses_the_contents_and_all_read_them(pulling: Any) -> None:
    first = Group(rank=0, size=2)
    assert pulling._agreed(first, Catalogue).was_asked_for == CONTENTS
    second = Group(rank=1, size=2, said=first.said)
    assert pulling._agreed(second, Catalogue).was_asked_for == CONTENTS


def test_a_first_rank_that_finds_nothing_says_why_to_the_others(pulling: Any) -> None:
    def read(_: object) -> None:
        raise LoaderError("no such source")

    first = Group(rank=0, size=2)
    with pytest.raises(LoaderError, match="no such source"):
        pulling._agreed(first, read)
    second = Group(rank=1, size=2, said=first.said)
    with pytest.raises(LoaderError, match="no such source"):
        pulling._agreed(second, Catalogue)


def test_tensors_that_are_no_request_are_a_failed_pull(pulling: Any) -> None:
    with pytest.raises(pulling.PullFailed, match="1 of 1 ranks could not pull") as caught:
        pulling.pull_into(nn.Linear(1, 1), [("w", torch.zeros(1))])
    assert "the request to pull weights is not valid" in str(caught.value)


def test_pipeline_stages_need_a_version(sglang: Process, pulling: Any) -> None:
    sglang.parallel.pp_size = 2
    with pytest.raises(pulling.PullFailed, match="give a `version` to `request`"):
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
