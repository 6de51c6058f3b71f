"""SGLang's pulls by a mirror: a real etcd and transfer engine, a trainer that makes snapshots, and
a stand-in for SGLang's context.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

from engine_loader import (
    Publication,
    PublishOptions,
    Snapshots,
    SocketEngine,
    publish_state_dict,
)
from engine_loader.integrations import mirroring
from engine_loader.integrations.sglang import request
from engine_registry import ModelIdentity, Registry
from tests.support.sglang import forget_ours, install
from tests.support.waiting import wait_until

Tensors = dict[str, torch.Tensor]


class Model(nn.Module):
    """Takes its weights as they come. `given` are the names of each call of `load_weights`."""

    def __init__(self, like: Tensors) -> None:
        super().__init__()
        zeros = {name.replace(".", "_"): torch.zeros_like(one) for name, one in like.items()}
        self.weights = nn.ParameterDict(zeros).requires_grad_(False)
        self.given: list[list[str]] = []
        self.fails = False

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.given.append([])
        for name, tensor in weights:
            if self.fails:
                raise RuntimeError("no memory")
            self.given[-1].append(name)
            self.weights[name.replace(".", "_")].copy_(tensor)

    def holds(self, tensors: Tensors) -> bool:
        return all(
            torch.equal(self.weights[name.replace(".", "_")], one) for name, one in tensors.items()
        )


class Pulls:
    def __init__(
        self, pulling: Any, model: Model, settings: dict[str, Any], state: Tensors
    ) -> None:
        self.pulling, self.model, self.settings, self.state = pulling, model, settings, state

    def pull(self, **more: Any) -> None:
        self.pulling.pull_into(self.model, request("t", timeout_s=5.0, **more, **self.settings))


@pytest.fixture
def state() -> Tensors:
    random = torch.Generator().manual_seed(0)
    names = ("embed", "layers.0.up", "layers.0.down", "layers.1.up")
    return {name: torch.randn(256, 256, generator=random) for name in names}


@pytest.fixture
def trainer(registry: Registry, state: Tensors) -> Iterator[Publication]:
    with (
        SocketEngine("127.0.0.1") as engine,
        publish_state_dict(
            registry,
            engine,
            state,
            instance="t",
            rank=0,
            world_size=1,
            model=ModelIdentity("policy"),
            options=PublishOptions(snapshots=Snapshots(count=3, deltas=4), ttl_s=3.0),
        ) as publication,
    ):
        yield publication


@pytest.fixture
def pulls(
    registry: Registry,
    state: Tensors,
    trainer: Publication,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Pulls]:
    caplog.set_level(logging.INFO)
    install(monkeypatch)
    forget_ours()
    pulling = importlib.import_module("engine_loader.integrations.sglang.pulling")
    settings = {
        "etcd": str(registry.config),
        "namespace": registry.config.namespace,
        "host": "127.0.0.1",
        "protocol": "socket",
        "mirror": True,
    }
    with ExitStack() as stack:
        connected = pulling._connected
        stack.callback(forget_ours)
        pulls = Pulls(pulling, Model(state), settings, state)
        yield pulls
        pulling._close_mirrors()
        if connected.cache_info().currsize:
            settings = {**pulls.settings, "labels": None}
            config = pulling.settings_of(pulling.Order("t", settings=settings))
            for one in reversed(connected(config)):
                one.close()


def facts_of(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    found = [getattr(record, "fields", {}) for record in caplog.records]
    return [facts for facts in found if facts.get("event") == event]


def test_versions_are_loaded_before_sglang_stops(
    pulls: Pulls, trainer: Publication, state: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    pulls.pull()
    assert pulls.model.holds(state)
    for version in (1, 2):
        for tensor in state.values():
            tensor.view(-1)[::100] += 1
        trainer.snapshot()
        wait_until(lambda: facts_of(caplog, "weights_mirrored")[-1]["version"] == version)  # noqa: B023
        assert not pulls.model.holds(state)
        pulls.pull(version=version, wait=False)
        assert pulls.model.holds(state)
        mirrored = facts_of(caplog, "weights_mirrored")[-1]
        assert mirrored["read_nbytes"] == 0 < mirrored["delta_nbytes"]
        pulled = facts_of(caplog, "weights_pulled")[-1]
        assert (pulled["version"], pulled["changed"]) == (version, len(state))
        assert {"pause_s", "load_s"} <= pulled.keys()


def test_all_tensors_are_given_a_layer_at_a_time(pulls: Pulls) -> None:
    pulls.pull()
    assert pulls.model.given == [["embed"], ["layers.0.down", "layers.0.up"], ["layers.1.up"]]


def test_a_pull_that_does_not_wait_leaves_the_weights_as_they_are_until_the_mirror_is_there(
    pulls: Pulls, state: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(pulls.pulling.PullFailed, match="which are as they were; rank 0"):
        pulls.pull(wait=False)
    assert pulls.model.given == []
    wait_until(lambda: facts_of(caplog, "weights_mirrored") != [])
    pulls.pull(wait=False)
    assert pulls.model.holds(state)


def test_a_pull_that_fails_in_sglang_may_have_left_a_mix_and_the_next_is_whole(
    pulls: Pulls, state: Tensors
) -> None:
    pulls.model.fails = True
    with pytest.raises(pulls.pulling.PullFailed, match="may be a mix of two versions now"):
        pulls.pull()
    pulls.model.fails = False
    pulls.pull()
    assert pulls.model.holds(state)


def test_without_memory_for_a_mirror_weights_are_read_in_the_pull(
    pulls: Pulls,
    state: Tensors,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(mirroring, "available_nbytes", lambda _: 0)
    pulls.pull()
    assert pulls.model.holds(state)
    assert len(facts_of(caplog, "mirror_unfit")) == 1
    assert "load_s" not in facts_of(caplog, "weights_pulled")[-1]


def test_a_mirror_of_another_trainer_takes_the_place_of_the_former(
    pulls: Pulls, registry: Registry, state: Tensors
) -> None:
    pulls.pull()
    with pytest.raises(pulls.pulling.PullFailed, match="which are as they were"):
        pulls.pulling.pull_into(pulls.model, request("nobody", timeout_s=0.1, **pulls.settings))
    assert [source for _, source in pulls.pulling._MIRRORINGS] == ["nobody"]
    pulls.pull()
    assert pulls.model.holds(state)


@pytest.mark.parametrize("mirror", [True, False])
def test_a_pull_of_an_engine_with_labels_works(pulls: Pulls, state: Tensors, mirror: bool) -> None:
    pulls.settings |= {"labels": {"team": "a"}, "mirror": mirror}
    pulls.pull()
    assert pulls.model.holds(state)


def test_a_wait_that_is_no_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="`wait` 1 is not valid"):
        request("t", wait=1)  # type: ignore[arg-type]
