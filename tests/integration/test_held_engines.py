"""Engines that are not ours, that are killed, and started again on the same host: their weights are
still there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine_loader.errors import EngineFailed
from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.tensors import runtime_tensors
from engine_loader.integrations.vllm.describing import Ranks, identity_of
from engine_loader.integrations.vllm.holding import adoptable_nbytes
from engine_loader.tensors.deferred import Deferred
from engine_loader.tensors.host_memory import memory_at
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.ports import free_port
from tests.integration.conftest import Processes, line_of
from tests.integration.test_held_starts import kill
from tests.integration.test_seeding import events
from tests.support.processes.held import content
from tests.support.room import FULL
from tests.support.vllm_layers import Model, ReplicatedLinear, checkpoint
from tests.support.vllm_start import StartedRank, identity, start_rank
from tests.support.waiting import wait_until


class Engines:
    """Starts engines, in processes that are killed, and in this one."""

    def __init__(self, processes: Processes, registry: Registry, settings: dict[str, Any]) -> None:
        self._processes, self.registry, self.settings = processes, registry, settings
        self.started: list[StartedRank] = []

    def kill_one(self, wanted: str = "disk") -> None:
        """One serves its weights, and is killed."""
        settings = json.dumps(self.settings)
        engine = self._processes.start("-m", "tests.support.vllm_start", settings, "loaded", "cpu")
        assert line_of(engine) == f"{wanted}\n"
        kill(engine, self.registry, identity("loaded", 1), {"tp": (0, 1)})

    def start(self, instance: str = "b") -> StartedRank:
        """From a checkpoint with other bytes, if it is read."""
        self.started.append(start_rank(self.settings, instance, seed=3))
        return self.started[-1]


@pytest.fixture
def engines(
    processes: Processes, registry: Registry, shared_etcd: LocalEtcd, namespace: str
) -> Iterator[Engines]:
    settings = {
        "etcd": shared_etcd.endpoint,
        "namespace": namespace,
        "host": "127.0.0.1",
        "timeout_s": 30,
        "hold_s": 60,
    }
    engines = Engines(processes, registry, settings)
    yield engines
    for started in engines.started:
        started.start.close()


def test_an_engine_that_is_killed_leaves_its_weights_to_the_next_one(engines: Engines) -> None:
    expected = Model(0, 1)
    expected.load_weights(checkpoint())
    engines.kill_one()
    second = engines.start()
    facts = second.start.outcome().facts()
    assert (facts["source"], facts["sources"]) == ("held", ["/engines/source/0"])
    assert str(second.start.outcome()).startswith("b/0 has adopted 0.0 MB of weights that /engines")
    for name, tensor in runtime_tensors(expected).items():
        assert torch.equal(second.tensors()[name].float(), tensor.float()), name
        assert memory_at(second.tensors()[name].data_ptr()) is not None
    wait_until(lambda: [one.instance for one in engines.registry.instances()] == ["b"])


def test_weights_outlive_one_engine_after_another(engines: Engines) -> None:
    engines.kill_one()
    engines.kill_one("held")
    second = engines.start()
    assert second.source == "held"
    assert second.start.copied_version == 0


def test_an_engine_without_hold_leaves_nothing_and_takes_what_is_held(engines: Engines) -> None:
    engines.kill_one()
    engines.settings["hold_s"] = 0
    assert engines.start().source == "held"


def test_an_engine_whose_memory_something_else_uses_is_served_but_not_held(
    engines: Engines, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(0, 1)
    kernel = model.get_submodule("qkv").get_parameter("weight").detach()
    monkeypatch.setattr("tests.support.vllm_start.Model", lambda *_: model)
    started = engines.start()
    assert started.start.serves
    assert events(caplog, "hold_refused") == ["WARNING"]
    assert kernel.data_ptr() == model.get_submodule("qkv").get_parameter("weight").data_ptr()


# -- on a device without room for the weights beside those that are held
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FULL.items():
        monkeypatch.setattr(name, value)


class Watched(Model):
    """Counts its parameters that have no memory when they are filled."""

    without_memory = 0

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        Watched.without_memory = sum(one.is_meta for one in self.parameters())


@pytest.mark.usefixtures("no_room")
def test_weights_are_adopted_by_a_model_that_was_made_without_memory(
    engines: Engines, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Model(0, 1)
    expected.load_weights(checkpoint())
    engines.kill_one()
    monkeypatch.setattr("tests.support.vllm_start.Model", Watched)
    second = engines.start()
    assert second.source == "held"
    assert Watched.without_memory == len(list(second.model.parameters()))
    for name, tensor in runtime_tensors(expected).items():
        assert torch.equal(second.tensors()[name].float(), tensor.float()), name
    for name, parameter in expected.named_parameters():
        marks = {*vars(parameter)} - {"weight_loader"}
        found = vars(second.model.get_parameter(name))
        assert {mark: found[mark] for mark in marks} == {m: vars(parameter)[m] for m in marks}
    assert events(caplog, "held_let_go") == []


class Other(Model):
    """Has a tensor that no checkpoint fills."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.more: nn.Module = ReplicatedLinear().add("weight", 300)


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize("etcd", ["there", "away"])
def test_what_cannot_be_adopted_is_let_go_and_the_model_gets_memory(
    engines: Engines,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    etcd: str,
) -> None:
    expected = Model(0, 1)
    expected.load_weights(checkpoint(3))
    engines.kill_one()
    monkeypatch.setattr("tests.support.vllm_start.Model", Other)
    if etcd == "away":
        engines.settings |= {"etcd": f"127.0.0.1:{free_port()}", "without_etcd_s": 0.5}
    second = engines.start()
    assert second.source == "disk"
    assert not second.model.get_parameter("more.weight").any()
    for name, parameter in expected.named_parameters():
        found = second.model.get_parameter(name)
        assert torch.equal(found.float(), parameter.float()), name
    if etcd == "there":
        assert events(caplog, "held_unusable") == ["WARNING"]
        assert events(caplog, "held_let_go") == ["WARNING"]
        wait_until(lambda: [one.instance for one in engines.registry.instances()] == ["b"])
    else:
        assert events(caplog, "held_let_go") == []


@pytest.mark.usefixtures("no_room")
def test_a_model_that_has_no_room_at_all_does_not_start_and_the_error_says_why(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.kill_one()
    monkeypatch.setattr("tests.support.vllm_start.Model", Other)

    def full(self: Deferred) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Deferred, "give_memory", full)
    engines.settings |= {"etcd": f"127.0.0.1:{free_port()}", "without_etcd_s": 0.5}
    with pytest.raises(EngineFailed, match=r"0\.00 GB are held for /engines/source/0") as caught:
        engines.start()
    assert caught.value.remedy == "free what is held, then start the engine again"


class TooLarge(Model):
    def __init__(self, rank: int, size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("room", [0, 1 << 40])
def test_a_model_that_does_not_fit_beside_what_is_held_says_what_that_is(
    engines: Engines,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
) -> None:
    engines.kill_one()
    monkeypatch.setattr("engine_loader.integrations.room.available_nbytes", lambda _: room)
    monkeypatch.setattr("tests.support.vllm_start.Model", TooLarge)
    with pytest.raises(torch.OutOfMemoryError):
        engines.start()
    assert events(caplog, "no_room_beside_held") == ["ERROR"]
    assert "held for /engines/source/0: free what is held" in caplog.text


# -- the memory that vLLM asks for
# --------------------------------------------------------------------------------------------------

RANKS = Ranks(tp=(0, 1))
VLLM = SimpleNamespace(
    model_config=SimpleNamespace(
        enable_sleep_mode=False,
        served_model_name="qwen",
        model="/models/qwen",
        revision="r1",
        dtype="torch.bfloat16",
        quantization=None,
        hf_config={"hidden_size": 64},
    ),
    speculative_config=None,
    parallel_config=SimpleNamespace(data_parallel_size=1),
    device_config=SimpleNamespace(device="cpu"),
)


@pytest.fixture
def left(engines: Engines, processes: Processes) -> IntegrationConfig:
    """The settings of a vLLM of which a worker was killed."""
    config = IntegrationConfig.of(engines.settings)
    model = identity_of(
        config, VLLM, VLLM.model_config, RANKS, stage="loaded", reshard=True, draft=False, build={}
    )
    rank = processes.start(
        *("-m", "tests.support.processes.held"),
        *(json.dumps({**vars(model), "extra": dict(model.extra)}), json.dumps(RANKS.topology)),
    )
    assert line_of(rank) == "serves\n"
    kill(rank, engines.registry, model, RANKS.topology)
    return config


def test_what_a_worker_will_adopt_is_known_before_its_model_is_made(
    left: IntegrationConfig,
) -> None:
    nbytes = adoptable_nbytes(left, VLLM, RANKS, {})
    assert nbytes >= sum(tensor.nbytes for tensor in content().values())
    assert adoptable_nbytes(left, VLLM, Ranks(tp=(1, 2)), {}) == 0
    assert (
        adoptable_nbytes(IntegrationConfig.of({**asdict(left), "revision": "r2"}), VLLM, RANKS, {})
        == 0
    )
