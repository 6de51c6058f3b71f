"""A real vLLM that starts from peers of another parallel layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine_registry import Registry
from tests.engines.vllm.conftest import Engines, held

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
Checkpoint = Callable[..., str]
# 330 tokens are padded, and two ranks have the same keys and values
SHAPE = {"vocab": 330, "kv_heads": 1}
PATCHES = ("plain_linear_layers", "pipeline_buffers")


@pytest.mark.parametrize("kind", ["llama", "llama-int8", "qwen2", "qwen3", "qwen3moe"])
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_an_engine_copies_from_one_with_other_sizes_of_tensor_parallelism(
    engines: Engines,
    checkpoint: Checkpoint,
    registry: Registry,
    kind: str,
    first: int,
    second: int,
) -> None:
    model = checkpoint(kind, **SHAPE)
    seed = engines.start(model, {}, patches=PATCHES, tensor_parallel_size=first)
    joiner = engines.start(model, {}, patches=PATCHES, tensor_parallel_size=second)
    alone = engines.start(model, patches=PATCHES, tensor_parallel_size=second)
    assert (seed.sources(), joiner.sources()) == (["disk"] * first, ["peers"] * second)
    assert joiner.copied() == held(registry, joiner.instance()) != []
    assert joiner.ask("checksums") == alone.ask("checksums") != [{}] * second
    assert joiner.generate() == alone.generate()


def test_the_stages_of_a_pipeline_copy_from_the_ranks_of_tensor_parallelism(
    engines: Engines, checkpoint: Checkpoint
) -> None:
    model = checkpoint("qwen3", **SHAPE)  # its last stage has the embeddings too
    engines.start(model, {}, patches=PATCHES, tensor_parallel_size=2)
    joiner = engines.start(model, {}, patches=PATCHES, pipeline_parallel_size=2)
    alone = engines.start(model, patches=PATCHES, pipeline_parallel_size=2)
    assert joiner.sources() == ["peers"] * 2
    assert joiner.ask("checksums") == alone.ask("checksums")


def test_reloaded_weights_are_copied_into_another_layout(
    engines: Engines, checkpoint: Checkpoint, registry: Registry
) -> None:
    model, other = checkpoint("llama", **SHAPE), checkpoint("llama", seed=7, **SHAPE)
    seed = engines.start(model, {}, patches=PATCHES)
    seed.ask("call", method="reload_weights", weights_path=other)
    joiner = engines.start(model, {}, patches=PATCHES, tensor_parallel_size=2)
    alone = engines.start(other, patches=PATCHES, tensor_parallel_size=2)
    assert joiner.sources() == ["peers"] * 2
    assert {record.version for one in registry.instances() for record in one.records} == {1}
    assert joiner.ask("checksums") == alone.ask("checksums")


def test_an_engine_that_is_not_to_reshard_reads_its_disk(
    engines: Engines, checkpoint: Checkpoint
) -> None:
    model = checkpoint("llama")
    engines.start(model, {"reshard": False})
    joiner = engines.start(model, {"reshard": False}, tensor_parallel_size=2)
    assert joiner.sources() == ["disk"] * 2


def test_a_model_that_cuts_its_tensors_itself_serves_only_the_same_layout(
    engines: Engines, checkpoint: Checkpoint
) -> None:
    model, own = checkpoint("llama"), ("fills_tensors_itself",)
    first = engines.start(model, {}, patches=own)
    assert first.facts() == []
    (line,) = first.warnings()
    assert "the model fills 4 tensors without the loaders of vLLM's layers" in line
    assert "set `reshard` to false" in line
    second = engines.start(model, {"reshard": False}, patches=own)
    third = engines.start(model, {"reshard": False}, patches=own)
    assert second.sources() + third.sources() == ["disk", "peers"]
    assert third.generate() == first.generate()
