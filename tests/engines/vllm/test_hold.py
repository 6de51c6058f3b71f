"""A real vLLM that dies, and one that is started in its place: its weights are still there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine_registry import Registry
from engine_registry.registration.held import Kept, keepers_here, let_go
from tests.engines.vllm.conftest import Engine, Engines
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
Checkpoint = Callable[..., str]
PLAIN, FAILS = ("plain_linear_layers",), ("fails_at_a_long_answer",)
NO_ROOM = ("no_room",)
HOLD = {"hold_s": 120}


def left_by(instance: str) -> list[Kept]:
    """What keepers hold of its ranks."""
    return [
        kept
        for kept in keepers_here()
        if kept.held and kept.key.startswith(f"/engines/{instance}/")
    ]


def kill(engine: Engine, ranks: int = 1) -> list[Kept]:
    """What it leaves."""
    instance = engine.instance()
    engine.kill()
    wait_until(lambda: len(left_by(instance)) == ranks)
    return left_by(instance)


Told = tuple[list[list[int]], Any]


def told_by(engine: Engine) -> Told:
    """What it answers, and the checksums of its weights."""
    return engine.generate(), engine.ask("checksums")


def kill_one(engines: Engines, model: str) -> tuple[Told, str]:
    """What it has told, and its instance, whose weights are held."""
    first = engines.start(model, HOLD)
    told, instance = told_by(first), first.instance()
    kill(first)
    return told, instance


def test_an_engine_that_is_killed_leaves_its_weights_to_one_after_another(
    engines: Engines, checkpoint: Checkpoint
) -> None:
    model = checkpoint("qwen3")  # with tied embeddings
    alone = engines.start(model, patches=PLAIN)
    first = engines.start(model, HOLD, patches=PLAIN)
    told = told_by(first)
    assert told == told_by(alone)
    content = first.facts()[0]["content"]
    for _ in range(2):
        kill(first)
        second = engines.start(model, HOLD, patches=PLAIN)
        assert second.sources() == ["held"]
        assert second.facts()[0]["content"] == content
        assert told_by(second) == told
        assert second.lines("does not leave its weights") == []
        first = second
    (line,) = first.lines("has adopted")
    assert "of weights that /engines/vllm." in line
    third = engines.start(model, {}, patches=PLAIN)
    assert third.sources() == ["peers"]  # of the one that has adopted
    assert third.generate() == told[0]


@pytest.mark.parametrize("kind", ["llama", "llama-int8", "qwen3moe"])
def test_weights_that_vllm_packs_for_a_cpu_outlive_it(
    engines: Engines, checkpoint: Checkpoint, kind: str
) -> None:
    model = checkpoint(kind)
    first = engines.start(model, HOLD)
    expected = first.generate()
    kill(first)
    second = engines.start(model, HOLD)
    assert second.sources() == ["held"]
    assert second.generate() == expected


@pytest.mark.parametrize("kind", ["qwen3", "llama-int8", "qwen3moe"])
def test_an_engine_without_room_for_more_weights_is_made_without_memory_and_adopts(
    engines: Engines, checkpoint: Checkpoint, kind: str
) -> None:
    model = checkpoint(kind)
    told, _ = kill_one(engines, model)
    second = engines.start(model, HOLD, patches=NO_ROOM)
    assert second.lines("the model is made without memory for")
    assert second.sources() == ["held"]
    assert told_by(second) == told
    if kind == "qwen3":  # vLLM 0.32 itself does not reload what it has packed for a CPU
        second.ask("call", method="reload_weights")  # from the disk, into the same model
        assert second.generate() == told[0]


@pytest.mark.parametrize("kind", ["qwen3", "llama-int8", "qwen3moe"])
def test_an_engine_without_room_that_cannot_adopt_frees_what_is_held_and_reads_its_disk(
    engines: Engines, checkpoint: Checkpoint, kind: str
) -> None:
    model = checkpoint(kind)
    told, instance = kill_one(engines, model)
    second = engines.start(model, HOLD, patches=(*NO_ROOM, "refuses_what_is_held"))
    assert second.sources() == ["disk"]
    assert second.lines("were not adopted, and are let go")
    assert left_by(instance) == []
    assert told_by(second) == told


@pytest.mark.parametrize("patches", [(), NO_ROOM], ids=["room", "no room"])
def test_of_two_workers_the_one_whose_weights_are_gone_reads_them(
    engines: Engines, checkpoint: Checkpoint, patches: tuple[str, ...]
) -> None:
    model = checkpoint("qwen2")
    first = engines.start(model, HOLD, tensor_parallel_size=2)
    expected = first.generate()
    one, _ = kill(first, ranks=2)
    let_go(one)
    second = engines.start(model, HOLD, tensor_parallel_size=2, patches=patches)
    assert sorted(second.sources()) == ["disk", "held"]
    assert second.generate() == expected
    kill(second, ranks=2)
    third = engines.start(model, {}, tensor_parallel_size=2, patches=patches)
    assert third.sources() == ["held", "held"]
    assert third.generate() == expected


def test_an_engine_that_ends_by_an_error_leaves_its_weights_and_one_that_is_stopped_does_not(
    engines: Engines, checkpoint: Checkpoint, registry: Registry
) -> None:
    model = checkpoint("llama")
    first = engines.start(model, HOLD, patches=FAILS)
    instance, expected = first.instance(), first.ask("tokens", prompt="Hello", count=4)
    with pytest.raises(AssertionError):
        first.ask("tokens", prompt="Hello", count=40)
    wait_until(lambda: left_by(instance) != [])
    second = engines.start(model, HOLD)
    assert second.sources() == ["held"]
    assert second.ask("tokens", prompt="Hello", count=4) == expected
    instance = second.instance()
    second.ask("stop")
    wait_until(lambda: registry.instances() == ())
    assert left_by(instance) == []


@pytest.mark.usefixtures("trainer")
@pytest.mark.parametrize("mirror", [False, True])
def test_weights_of_a_trainer_outlive_the_engine(
    engines: Engines, checkpoint: Checkpoint, registry: Registry, mirror: bool
) -> None:
    model = checkpoint("llama")
    how: dict[str, Any] = {"weight_transfer_config": {"backend": "engine_registry"}}
    first = engines.start(model, HOLD, patches=PLAIN, **how)
    before = first.generate()
    source = {"source": "trainer", "etcd": str(registry.config), "mirror": mirror}
    more = {"namespace": registry.config.namespace, "host": "127.0.0.1"}
    first.ask("follow", init_info={**source, **more})
    first.ask("update", update_info={})
    after = first.generate()
    assert after != before
    assert first.facts()[0]["version"] == 1
    kill(first)
    second = engines.start(model, HOLD, patches=PLAIN, **how)
    assert (second.sources(), second.facts()[0]["version"]) == (["held"], 1)
    assert second.generate() == after
    second.ask("call", method="reload_weights")
    assert second.generate() == before
    kill(second)
    third = engines.start(model, {}, patches=PLAIN)
    assert (third.sources(), third.facts()[0]["version"]) == (["held"], 2)
    assert third.generate() == before
