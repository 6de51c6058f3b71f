"""A running SGLang pulls the weights of a trainer, and serves them to its peers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine_loader import (
    MooncakeEngine,
    Publication,
    PublishOptions,
    Snapshots,
    publish_state_dict,
)
from engine_registry import ModelIdentity, RankState, Registry
from tests.engines.sglang.checkpoint import weights, write_checkpoint
from tests.engines.sglang.engines import Engines
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
PULL: dict[str, Any] = {"custom_weight_loader": ["engine_loader.integrations.sglang.pull"]}
MODEL = ModelIdentity("trainer")


class Trainer:
    """Publishes whole tensors, as a rank of a trainer does."""

    def __init__(
        self, registry: Registry, engine: MooncakeEngine, seed: int, snapshots: Snapshots | None
    ) -> None:
        self.weights = weights(seed)
        self.publication: Publication = publish_state_dict(
            registry,
            engine,
            instance="trainer",
            rank=0,
            world_size=1,
            state_dict=self.weights,
            model=MODEL,
            options=PublishOptions(version=3, snapshots=snapshots),
        )

    def step(self, seed: int) -> None:
        with self.publication.update():
            for name, tensor in weights(seed).items():
                self.weights[name].copy_(tensor)

    def snapshot(self, seed: int) -> int:
        """The version that this makes."""
        for name, tensor in weights(seed).items():
            self.weights[name].copy_(tensor)
        return self.publication.snapshot()


@contextmanager
def training(registry: Registry, snapshots: Snapshots | None = None) -> Iterator[Trainer]:
    with ExitStack() as stack:
        engine = stack.enter_context(MooncakeEngine("127.0.0.1"))
        trainer = Trainer(registry, engine, 7, snapshots)
        stack.enter_context(trainer.publication)
        yield trainer


@pytest.fixture
def trainer(registry: Registry) -> Iterator[Trainer]:
    with training(registry) as trainer:
        yield trainer


def states(registry: Registry) -> dict[str, list[tuple[RankState, int]]]:
    return {
        status.instance: [(record.state, record.version) for record in status.records]
        for status in registry.instances()
        if status.instance != "trainer"
    }


@pytest.mark.parametrize("tp_size", [1, 2])
def test_pulled_weights_are_those_of_a_load_from_disk_and_go_on_to_peers(
    engines: Engines,
    registry: Registry,
    settings: dict[str, object],
    trainer: Trainer,
    model: Path,
    trained: Path,
    tp_size: int,
) -> None:
    plain = engines.start(trained, tp_size=tp_size)
    expected = plain.tokens()
    plain.close()
    first = engines.start(model, settings, tp_size=tp_size, **PULL)
    assert first.tokens() != expected
    outcomes = first.call("pull", "trainer")
    assert all(outcome[0] for outcome in outcomes), outcomes
    assert first.tokens() == expected
    assert len(first.lines("pulled version 3 of trainer")) == tp_size
    (ranks,) = states(registry).values()
    assert ranks == [(RankState.READY, 1)] * tp_size
    second = engines.start(model, settings, tp_size=tp_size)
    assert len(second.lines("MB of weights from")) == tp_size
    assert second.tokens() == expected


@pytest.mark.parametrize("tp_size", [1, 2])
def test_versions_are_loaded_into_a_mirror_while_sglang_serves(
    engines: Engines,
    registry: Registry,
    settings: dict[str, object],
    model: Path,
    tmp_path: Path,
    tp_size: int,
) -> None:
    with training(registry, Snapshots(count=2)) as trainer:
        engine = engines.start(model, {**settings, "mirror": True}, tp_size=tp_size, **PULL)
        assert all(outcome[0] for outcome in engine.call("pull", "trainer"))
        for seed in (8, 9):
            before = engine.tokens()
            version = trainer.snapshot(seed)
            assert engine.tokens() == before

            def pulled(version: int = version) -> bool:
                _, (succeeded, why), _ = engine.call("pull", "trainer", version=version, wait=False)
                assert succeeded or f"does not have version {version} of trainer yet" in why
                return bool(succeeded)

            wait_until(pulled)
            plain = engines.start(write_checkpoint(tmp_path / str(seed), seed), tp_size=tp_size)
            assert engine.tokens() == plain.tokens() != before
            plain.close()
        assert len(engine.lines("a mirror of")) == tp_size


def test_pipeline_stages_pull_the_version_that_the_request_names(
    engines: Engines,
    settings: dict[str, object],
    trainer: Trainer,
    model: Path,
    trained: Path,
) -> None:
    plain = engines.start(trained, pp_size=2)
    expected = plain.tokens()
    plain.close()
    engine = engines.start(model, settings, pp_size=2, **PULL)
    outcomes = engine.call("pull", "trainer", version=trainer.publication.version)
    assert all(outcome[0] for outcome in outcomes), outcomes
    assert engine.tokens() == expected


def test_a_pull_that_fails_leaves_the_engine_running_and_peers_waiting(
    engines: Engines,
    registry: Registry,
    settings: dict[str, object],
    trainer: Trainer,
    model: Path,
) -> None:
    first = engines.start(model, settings, **PULL)
    before = first.tokens()
    _, (succeeded, why), _ = first.call("pull", "nobody", timeout_s=0.5)
    assert not succeeded
    assert "1 of 1 ranks could not pull their weights" in why
    assert first.tokens() == before
    wait_until(lambda: list(states(registry).values()) == [[(RankState.UPDATING, 0)]])
    trainer.step(seed=8)
    outcomes = first.call("pull", "trainer", version=4)
    assert all(outcome[0] for outcome in outcomes), outcomes
    wait_until(lambda: list(states(registry).values()) == [[(RankState.READY, 1)]])
    assert first.lines("pulled version 4 of trainer")


def test_an_engine_that_reads_another_checkpoint_serves_it_as_the_next_version(
    engines: Engines,
    registry: Registry,
    settings: dict[str, object],
    model: Path,
    trained: Path,
) -> None:
    first = engines.start(model, settings)
    before = first.tokens()
    succeeded, _, *_ = first.call("update_weights_from_disk", str(trained))
    assert succeeded
    after = first.tokens()
    assert after != before
    assert list(states(registry).values()) == [[(RankState.READY, 1)]]
    second = engines.start(model, settings)
    assert second.tokens() == after
