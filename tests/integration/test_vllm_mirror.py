"""vLLM's updates by a mirror: a real etcd and transfer engine, a trainer that makes snapshots, and
a stand-in for vLLM's reload.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_loader import (
    LoadOptions,
    Pace,
    Publication,
    PublishOptions,
    Snapshots,
    SocketEngine,
    publish_state_dict,
)
from engine_loader.errors import LoaderError, TornRead, VersionUnavailable
from engine_loader.integrations import mirroring
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import EngineRegistryError, InvalidField
from tests.integration.conftest import Processes, line_of
from tests.support import vllm_reload
from tests.support.gates import Gate
from tests.support.vllm_reload import Model, checkpoint
from tests.support.waiting import wait_until

NBYTES = 4 * vllm_reload.WIDTH**2  # of a tensor
COUNT = len(checkpoint())
SLOW = Pace(64 << 10, 1, stall_s=0.5, patience_s=2.0)
SNAPSHOTS = Snapshots(count=3, deltas=4)


class Trainer:
    """Publishes the weights of a checkpoint, as snapshots unless `snapshots` is None."""

    def __init__(self, registry: Registry, stack: ExitStack, snapshots: Snapshots | None) -> None:
        self.state = checkpoint()
        self.publication: Publication = stack.enter_context(
            publish_state_dict(
                registry,
                stack.enter_context(SocketEngine("127.0.0.1")),
                self.state,
                instance="t",
                rank=0,
                world_size=1,
                model=ModelIdentity("policy"),
                options=PublishOptions(snapshots=snapshots, digests=True, ttl_s=3.0),
            )
        )

    def step(self, *names: str) -> int:
        """Changes some elements of these tensors; the version that this makes."""
        for name in names or self.state:
            self.state[name].view(-1)[::100] += 1
        return self.publication.snapshot()


class Engine:
    """A worker of vLLM that takes weights, and what happens to it, in order."""

    def __init__(self, transfer: Any, worker: Any, events: list[str]) -> None:
        self.transfer, self.worker, self.events = transfer, worker, events
        self.model: Model = transfer.model

    def start(self, **update: Any) -> None:
        self.events.append("start")
        self.transfer.start_weight_update()
        self.transfer.update_weights(update)

    def update(self, **update: Any) -> None:
        self.start(**update)
        self.transfer.finish_weight_update()
        self.events.append("finish")

    @property
    def handed(self) -> list[str]:
        """The names in the order in which they were handed since this was asked last."""
        names = [name for call in self.model.calls for name in call]
        self.model.calls.clear()
        return names

    def wait_for_mirror(self, version: int) -> None:
        wait_until(lambda: f"mirrored {version}" in self.events)


@pytest.fixture
def trainers(registry: Registry) -> Iterator[Callable[..., Trainer]]:
    with ExitStack() as stack:
        yield lambda snapshots=SNAPSHOTS: Trainer(registry, stack, snapshots)


@pytest.fixture
def engine(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Engine]:
    caplog.set_level(logging.INFO)
    with engine_of(registry, monkeypatch) as engine:
        yield engine


@contextmanager
def engine_of(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, **config: Any
) -> Iterator[Engine]:
    kind = vllm_reload.install(monkeypatch)
    transfer_module = importlib.import_module("engine_loader.integrations.vllm.transfer")
    vllm_config = SimpleNamespace(
        quant_config=None,
        model_config=SimpleNamespace(quantization=None),
        load_config=SimpleNamespace(load_format="auto"),
    )
    transfer = transfer_module.RegistryTransfer(None, vllm_config, torch.device("cpu"), Model())
    events: list[str] = []
    with listening(events):
        transfer.init_transfer_engine(
            transfer.parse_init_info(
                {
                    "source": "t",
                    "etcd": str(registry.config),
                    "namespace": registry.config.namespace,
                    "host": "127.0.0.1",
                    "protocol": "socket",
                    "timeout_s": 10,
                    "mirror": True,
                    **config,
                }
            )
        )
        yield Engine(transfer, kind(transfer), events)
        transfer.shutdown()


@contextmanager
def listening(events: list[str]) -> Iterator[None]:
    """What the log says comes among the events."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            facts = getattr(record, "fields", {})
            if facts.get("event") == "weights_mirrored":
                events.append(f"mirrored {facts['version']}")

    handler = Handler()
    logger = logging.getLogger("engine_loader.integrations")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def facts_of(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    found = [getattr(record, "fields", {}) for record in caplog.records]
    return [facts for facts in found if facts.get("event") == event]


def test_each_version_is_loaded_before_vllm_stops_and_only_changed_layers_are_handed(
    engine: Engine, trainers: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainers()
    engine.update()
    assert engine.model.holds(trainer.state)
    assert sorted(engine.handed) == sorted(trainer.state)
    steps = {
        ("layers.1.q",): ["layers.1.down", "layers.1.k", "layers.1.q"],
        ("embed",): ["embed", "head"],
        ("layers.0.down", "layers.2.k"): [
            f"layers.{layer}.{leaf}" for layer in (0, 2) for leaf in ("down", "k", "q")
        ],
        (): list(trainer.state),
    }
    for changed, handed in steps.items():
        before = {name: tensor.clone() for name, tensor in trainer.state.items()}
        version = trainer.step(*changed)
        engine.wait_for_mirror(version)
        assert engine.model.holds(before)
        engine.update(version=version, wait=False)
        assert engine.model.holds(trainer.state)
        assert sorted(engine.handed) == sorted(handed)
        assert (engine.transfer.version, engine.transfer.changed) == (version, len(handed))
    assert engine.events == ["start", "mirrored 0", "finish"] + [
        event for number in range(1, 5) for event in (f"mirrored {number}", "start", "finish")
    ]
    first, *others = facts_of(caplog, "weights_mirrored")
    assert (first["read_nbytes"], first["delta_nbytes"]) == (COUNT * NBYTES, 0)
    for facts in others:
        assert facts["read_nbytes"] == 0
        assert 0 < facts["delta_nbytes"] < 0.1 * COUNT * NBYTES
    applied = facts_of(caplog, "weights_applied")
    assert [facts["changed"] for facts in applied] == [COUNT, 3, 2, 6, COUNT]
    assert all({"pause_s", "load_s"} <= facts.keys() for facts in applied)


def test_versions_between_two_updates_are_passed_over_and_a_former_one_can_be_taken(
    engine: Engine, trainers: Callable[..., Trainer]
) -> None:
    trainer = trainers()
    engine.update()
    trainer.step("layers.0.q")
    engine.wait_for_mirror(1)
    former = {name: tensor.clone() for name, tensor in trainer.state.items()}
    trainer.step("layers.1.q")
    engine.wait_for_mirror(2)
    assert engine.handed
    engine.update()
    assert engine.model.holds(trainer.state)
    assert {name[:8] for name in engine.handed} == {"layers.0", "layers.1"}
    engine.update(version=1)
    assert engine.model.holds(former)
    assert {name[:8] for name in engine.handed} == {"layers.1"}


def test_weights_that_have_not_changed_are_not_handed(
    engine: Engine, trainers: Callable[..., Trainer]
) -> None:
    trainer = trainers()
    engine.update()
    assert engine.handed
    engine.update()
    assert engine.handed == []
    assert engine.model.holds(trainer.state)


def test_the_released_version_is_followed_after_an_update_that_has_taken_it(
    engine: Engine, trainers: Callable[..., Trainer]
) -> None:
    trainer = trainers()
    trainer.publication.release()
    engine.update(version="released")
    trainer.step("layers.0.q")
    trainer.publication.release()
    engine.wait_for_mirror(1)
    engine.update(version="released", wait=False)
    assert engine.model.holds(trainer.state)


def test_an_update_that_does_not_wait_fails_until_the_mirror_is_there_and_changes_nothing(
    engine: Engine, trainers: Callable[..., Trainer]
) -> None:
    trainer = trainers()
    with pytest.raises(LoaderError, match="does not have version 0 of t yet"):
        engine.update(wait=False)
    assert engine.handed == []
    engine.wait_for_mirror(0)
    engine.update(wait=False)
    assert engine.model.holds(trainer.state)


def test_an_update_that_does_not_wait_neither_waits_for_a_load_nor_ends_it(
    engine: Engine, trainers: Callable[..., Trainer]
) -> None:
    trainer = trainers()
    engine.update()
    gate = Gate(0.5)
    engine.transfer._mirroring._options = LoadOptions(progress=gate.see, pace=SLOW)
    for name in trainer.state:
        trainer.state[name].mul_(2)  # too much for a delta
    engine.events.clear()
    version = trainer.publication.snapshot()
    assert gate.reached.wait(60)
    for update in ({}, {"version": version}, {"version": 0}):
        with pytest.raises(LoaderError, match="yet, and the model is as it was"):
            engine.update(**update, wait=False)
    assert engine.events == ["start"] * 3
    gate.open.set()
    engine.wait_for_mirror(version)
    engine.wait_for_mirror(0)  # as the last of them has asked for it


def test_a_former_version_that_an_update_does_not_wait_for_is_loaded_next(
    engine: Engine, trainers: Callable[..., Trainer]
) -> None:
    trainer = trainers()
    engine.update()
    former = {name: tensor.clone() for name, tensor in trainer.state.items()}
    engine.wait_for_mirror(trainer.step("layers.0.q"))
    engine.update(version=1, wait=False)
    engine.events.clear()
    with pytest.raises(LoaderError, match="does not have version 0 of t yet"):
        engine.update(version=0, wait=False)
    assert engine.model.holds(trainer.state)
    engine.wait_for_mirror(0)
    engine.update(version=0, wait=False)
    assert engine.model.holds(former)
    engine.wait_for_mirror(1)  # the newest is followed again
    engine.update(wait=False)
    assert engine.model.holds(trainer.state)


def test_a_draft_may_share_modules_so_an_update_of_one_model_makes_the_other_take_all(
    engine: Engine, trainers: Callable[..., Trainer]
) -> None:
    trainer, target = trainers(), engine.model
    former = {name: tensor.clone() for name, tensor in trainer.state.items()}
    engine.update()
    trainer.step("embed")
    draft = Model()
    draft.embed = target.embed
    engine.transfer.model = draft
    engine.update()
    assert draft.holds(trainer.state)
    engine.transfer.model = target
    engine.update(version=0)
    assert target.holds(former)


@pytest.mark.parametrize("means", ["quantised", "an unknown vLLM"])
def test_all_tensors_are_handed_where_a_part_might_not_do(
    engine: Engine, trainers: Callable[..., Trainer], means: str
) -> None:
    if means == "quantised":
        engine.transfer.model_config.quantization = "fp8"
    else:
        engine.transfer._partly = False
    trainer = trainers()
    for _ in range(2):
        engine.update()
        assert engine.model.holds(trainer.state)
        assert sorted(engine.handed) == sorted(trainer.state)
        trainer.step("layers.0.q")


@pytest.mark.parametrize("change", ["a reload", "a sleep that discards them"])
def test_all_tensors_are_handed_after_the_weights_have_become_others(
    engine: Engine, trainers: Callable[..., Trainer], change: str
) -> None:
    trainer = trainers()
    engine.update()
    assert engine.handed
    if change == "a reload":
        engine.worker.reload_weights()
        assert not engine.model.holds(trainer.state)
    else:
        engine.worker.sleep(level=2)
    engine.update()
    assert engine.model.holds(trainer.state)
    assert sorted(engine.handed) == sorted(trainer.state)


def test_after_an_update_that_has_failed_in_vllm_all_tensors_are_handed(
    engine: Engine, trainers: Callable[..., Trainer]
) -> None:
    trainer = trainers()
    engine.update()
    assert engine.handed
    engine.wait_for_mirror(trainer.step("layers.0.q", "layers.1.q"))
    engine.model.fails = "layers.1.k"
    with pytest.raises(RuntimeError, match="no memory for layers"):
        engine.update()
    engine.model.fails = ""
    engine.model.calls.clear()
    engine.wait_for_mirror(trainer.step("layers.2.q"))
    engine.update()
    assert engine.model.holds(trainer.state)
    assert sorted(engine.handed) == sorted(trainer.state)


def test_nothing_is_loaded_into_the_mirror_between_the_weights_and_the_end_of_an_update(
    engine: Engine, trainers: Callable[..., Trainer]
) -> None:
    trainer = trainers()
    engine.update()
    engine.start()
    before = {name: tensor.clone() for name, tensor in trainer.state.items()}
    trainer.step()
    with pytest.raises(TimeoutError):
        wait_until(lambda: "mirrored 1" in engine.events, 1.0)
    engine.transfer.finish_weight_update()
    assert engine.model.holds(before)
    engine.wait_for_mirror(1)


def test_without_memory_for_a_mirror_weights_are_read_in_the_update(
    engine: Engine,
    trainers: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(mirroring, "available_nbytes", lambda _: 2 * COUNT * NBYTES - 1)
    trainer = trainers()
    for _ in range(2):
        engine.update(wait=False)
        assert engine.model.holds(trainer.state)
        trainer.step("layers.0.q")
    (facts,) = facts_of(caplog, "mirror_unfit")
    assert facts["nbytes"] == COUNT * NBYTES
    assert [facts["changed"] for facts in facts_of(caplog, "weights_applied")] == [COUNT] * 2
    assert not any("load_s" in facts for facts in facts_of(caplog, "weights_applied"))
    monkeypatch.setattr(mirroring, "available_nbytes", lambda _: 2 * COUNT * NBYTES)
    engine.update()
    assert engine.model.holds(trainer.state)
    assert facts_of(caplog, "mirror_made")


def test_a_trainer_that_updates_in_place_is_followed_as_well(
    engine: Engine, trainers: Callable[..., Trainer]
) -> None:
    trainer = trainers(None)
    engine.update()
    for version in (1, 2):
        with trainer.publication.update():
            trainer.state["layers.0.q"].mul_(2)
        engine.wait_for_mirror(version)
        engine.update(wait=False)
        assert engine.model.holds(trainer.state)


def test_a_load_that_an_update_in_place_tears_is_made_again(
    engine: Engine, trainers: Callable[..., Trainer]
) -> None:
    trainer = trainers(None)
    engine.update()
    before = {name: tensor.clone() for name, tensor in trainer.state.items()}
    gate = Gate(0.5)
    engine.transfer._mirroring._options = LoadOptions(progress=gate.see, pace=SLOW)
    for factor in (2, 3):
        with trainer.publication.update():
            for tensor in trainer.state.values():
                tensor.mul_(factor)
        assert gate.reached.wait(60)  # the first version is being read
    gate.open.set()
    engine.wait_for_mirror(2)
    assert "mirrored 1" not in engine.events
    assert engine.model.holds(before)
    engine.update(wait=False)
    assert engine.model.holds(trainer.state)


def test_other_tensors_take_a_new_mirror(
    engine: Engine, registry: Registry, trainers: Callable[..., Trainer]
) -> None:
    with ExitStack() as stack:
        first = Trainer(registry, stack, Snapshots(count=2))
        engine.update()
        assert engine.model.holds(first.state)
    engine.handed  # noqa: B018
    second = trainers(None)
    with second.publication.update():
        second.state["embed"].mul_(3)
    second.publication.pause()
    del second.state["head"]
    second.publication.replace(second.state)
    engine.update()
    assert engine.model.holds(second.state)
    assert sorted(engine.handed) == sorted(second.state)


def test_an_update_of_a_version_that_is_not_served_leaves_the_model_as_it_is(
    engine: Engine, trainers: Callable[..., Trainer]
) -> None:
    trainer = trainers()
    engine.update()
    assert engine.handed
    with pytest.raises((VersionUnavailable, TornRead), match="version 99"):
        engine.update(version=99)
    assert engine.handed == []
    assert engine.model.holds(trainer.state)
    engine.wait_for_mirror(trainer.step("layers.0.q"))
    engine.update(wait=False)
    assert engine.model.holds(trainer.state)


def test_settings_of_an_update_that_are_not_valid_are_refused(engine: Engine) -> None:
    with pytest.raises(InvalidField, match="`wait` 1 is not valid"):
        engine.transfer.parse_update_info({"wait": 1})
    with pytest.raises(InvalidField, match="unknown keys: now: known are version, wait"):
        engine.transfer.parse_update_info({"now": True})


def test_a_trainer_that_dies_while_its_version_is_loaded_leaves_the_old_one_and_the_next_is_exact(
    engine: Engine, processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    first = processes.start("-m", "tests.support.processes.policy")
    assert line_of(first) == "version 0\n"
    engine.update()
    before = {name: value.clone() for name, value in checkpoint().items()}
    assert engine.model.holds(before)
    assert engine.handed
    gate = Gate(0.5)
    engine.transfer._mirroring._options = LoadOptions(progress=gate.see, pace=SLOW)
    print("all", file=first.stdin, flush=True)
    assert gate.reached.wait(60)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    gate.open.set()
    wait_until(lambda: facts_of(caplog, "mirror_waits") != [])
    assert engine.model.holds(before)
    assert engine.handed == []
    assert "mirrored 1" not in engine.events
    engine.transfer._mirroring._options = LoadOptions()
    engine.transfer._info.config = engine.transfer._info.config.of({"timeout_s": 0.2})
    with pytest.raises(EngineRegistryError):
        engine.update(version=1)
    assert engine.model.holds(before)
    second = processes.start("-m", "tests.support.processes.policy")
    assert line_of(second) == "version 0\n"
    engine.wait_for_mirror(0)
    print("layers.1.q", file=second.stdin, flush=True)
    assert line_of(second) == "version 1\n"
    engine.wait_for_mirror(1)
    before["layers.1.q"].view(-1)[::100] += 1
    engine.update(wait=False)
    assert engine.model.holds(before)
