"""A real vLLM whose weights change while peers may copy them: sleep, reload, and a trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine_loader import Publication
from engine_registry import RankRecord, RankState, Registry
from tests.engines.vllm.conftest import Engine, Engines

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
Checkpoint = Callable[..., str]
PLAIN, HIDDEN = ("plain_linear_layers",), ("hidden_linear_weights",)
TRANSFER = {"backend": "engine_registry"}


def record(registry: Registry) -> RankRecord:
    """Of the one rank that is registered as vLLM."""
    (found,) = [
        one
        for status in registry.instances()
        for one in status.records
        if one.instance.startswith("vllm.")
    ]
    return found


def follow(engine: Engine, registry: Registry) -> None:
    engine.ask(
        "follow",
        init_info={
            "source": "trainer",
            "etcd": str(registry.config),
            "namespace": registry.config.namespace,
            "host": "127.0.0.1",
        },
    )


def test_a_sleeping_engine_serves_nothing_until_it_wakes_up(
    engines: Engines, checkpoint: Checkpoint, registry: Registry
) -> None:
    model = checkpoint("llama")
    first = engines.start(model, {})
    tokens = first.generate()
    first.ask("call", method="sleep", level=1)
    assert record(registry).state is RankState.UPDATING
    first.ask("call", method="wake_up")
    assert (record(registry).state, record(registry).version) == (RankState.READY, 0)
    second = engines.start(model, {})
    assert second.facts()[0]["source"] == "peers"
    assert second.generate() == tokens


def test_weights_that_a_sleep_discards_come_back_with_a_reload(
    engines: Engines, checkpoint: Checkpoint, registry: Registry
) -> None:
    first = engines.start(checkpoint("llama"), {}, patches=PLAIN)
    tokens = first.generate()
    first.ask("call", method="sleep", level=2)
    first.ask("call", method="wake_up")
    assert record(registry).state is RankState.UPDATING
    first.ask("call", method="reload_weights")
    assert (record(registry).state, record(registry).version) == (RankState.READY, 1)
    assert first.generate() == tokens


def test_reloaded_weights_are_the_next_version(
    engines: Engines, checkpoint: Checkpoint, registry: Registry
) -> None:
    model = checkpoint("llama")
    first = engines.start(model, {}, patches=PLAIN)
    first.ask("call", method="reload_weights", weights_path=checkpoint("llama", seed=7))
    assert record(registry).version == 1
    second = engines.start(model, {}, patches=PLAIN)
    assert second.facts()[0]["source"] == "peers"
    expected = engines.start(checkpoint("llama", seed=7), patches=PLAIN).generate()
    assert first.generate() == second.generate() == expected


def test_weights_that_were_only_kept_for_peers_are_not_served_after_a_reload(
    engines: Engines, checkpoint: Checkpoint, registry: Registry
) -> None:
    """As with oneDNN, vLLM computes with other memory than it has loaded."""
    first = engines.start(checkpoint("llama"), {}, patches=HIDDEN)
    assert first.facts()[0]["extra_nbytes"] > 0
    first.ask("call", method="reload_weights")
    assert registry.instances() == ()
    (line,) = first.warnings()
    assert "set `stage` to `processed`" in line


@pytest.mark.parametrize("tp", [1, 2])
def test_weights_of_a_trainer_are_those_of_its_checkpoint(
    engines: Engines,
    checkpoint: Checkpoint,
    registry: Registry,
    trainer: Publication,
    tp: int,
) -> None:
    engine = engines.start(
        checkpoint("llama"), weight_transfer_config=TRANSFER, tensor_parallel_size=tp
    )
    before = engine.generate()
    follow(engine, registry)
    engine.ask("update", update_info={})
    assert engine.ask("transferred") == [trainer.version] * tp
    expected = engines.start(checkpoint("llama", seed=7), tensor_parallel_size=tp).generate()
    assert engine.generate() == expected != before


def test_an_update_from_a_trainer_is_served_as_the_next_version(
    engines: Engines, checkpoint: Checkpoint, registry: Registry, trainer: Publication
) -> None:
    model = checkpoint("llama")
    first = engines.start(model, {}, patches=PLAIN, weight_transfer_config=TRANSFER)
    follow(first, registry)
    first.ask("update", update_info={"version": 7})
    assert record(registry).version == 1
    second = engines.start(model, {}, patches=PLAIN)
    assert second.facts()[0]["source"] == "peers"
    assert second.generate() == first.generate()


@pytest.mark.parametrize("tp", [1, 2])
def test_a_version_that_the_trainer_does_not_have_is_refused_and_the_next_update_works(
    engines: Engines, checkpoint: Checkpoint, registry: Registry, trainer: Publication, tp: int
) -> None:
    how: dict[str, Any] = {"tensor_parallel_size": tp}
    engine = engines.start(checkpoint("llama"), weight_transfer_config=TRANSFER, **how)
    before = engine.generate()
    follow(engine, registry)
    with pytest.raises(AssertionError, match="version 99 is not served: trainer has 7"):
        engine.ask("update", update_info={"version": 99})
    assert engine.generate() == before
    engine.ask("update", update_info={})
    expected = engines.start(checkpoint("llama", seed=7), **how).generate()
    assert engine.generate() == expected


def test_ranks_that_would_have_different_versions_all_read_the_disk(
    engines: Engines, checkpoint: Checkpoint, registry: Registry
) -> None:
    model = checkpoint("llama")
    first = engines.start(model, {}, patches=PLAIN, tensor_parallel_size=2)
    first.ask("call", method="reload_weights", weights_path=checkpoint("llama", seed=7))
    (status,) = registry.instances()
    assert [one.version for one in status.records] == [1, 1]
    assert registry.evict(status.records[1])
    second = engines.start(model, {}, patches=PLAIN, tensor_parallel_size=2)
    assert second.facts() == []
    assert all("different versions (0, 1)" in line for line in second.warnings())
    expected = engines.start(model, patches=PLAIN, tensor_parallel_size=2).generate()
    assert second.generate() == expected
