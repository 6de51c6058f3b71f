"""A real vLLM that starts with our load format: from its disk, from peers, and in spite of us."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine_registry import Registry
from engine_registry.etcd.ports import free_port
from tests.engines.vllm.conftest import Engine, Engines, held
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
Checkpoint = Callable[..., str]
PLAIN, HIDDEN = ("plain_linear_layers",), ("hidden_linear_weights",)


def test_the_first_reads_its_disk_and_the_second_copies_all_of_it(
    engines: Engines, checkpoint: Checkpoint, registry: Registry
) -> None:
    model = checkpoint("qwen3")  # with tied embeddings
    alone = engines.start(model)
    first = engines.start(model, {})
    second = engines.start(model, {})
    assert (first.sources(), second.sources()) == (["disk"], ["peers"])
    assert first.generate() == second.generate() == alone.generate()
    assert first.ask("checksums") == second.ask("checksums") == alone.ask("checksums") != [{}]
    assert sum(second.copied()) == sum(held(registry, first.instance())) > 0
    assert second.warnings() == []


def test_without_etcd_it_starts_from_disk_after_one_warning(
    engines: Engines, checkpoint: Checkpoint
) -> None:
    model = checkpoint("llama")
    dead = f"127.0.0.1:{free_port('127.0.0.1')}"
    engine = engines.start(model, {"etcd": dead, "without_etcd_s": 1})
    assert engine.facts() == []
    assert engine.generate() == engines.start(model).generate()
    (line,) = engine.warnings()
    assert "check the address and that etcd is running" in line


def test_another_revision_is_read_from_disk(engines: Engines, checkpoint: Checkpoint) -> None:
    model = checkpoint("llama")
    engines.start(model, {"revision": "r1"})
    assert engines.start(model, {"revision": "r2"}).sources() == ["disk"]


def test_settings_that_are_not_known_are_refused_by_name(
    engines: Engines, checkpoint: Checkpoint
) -> None:
    with pytest.raises(AssertionError):
        engines.start(checkpoint("llama"), {"etdc": "127.0.0.1:1"})
    assert any("has an unknown key: etdc: known are" in line for line in engines.last.lines(""))


def test_two_workers_of_tensor_parallelism_copy_their_halves(
    engines: Engines, checkpoint: Checkpoint, registry: Registry
) -> None:
    model = checkpoint("qwen2")  # with biases of qkv
    expected = engines.start(model, tensor_parallel_size=2).generate()
    first = engines.start(model, {}, tensor_parallel_size=2)
    second = engines.start(model, {}, tensor_parallel_size=2)
    assert (first.sources(), second.sources()) == (["disk"] * 2, ["peers"] * 2)
    assert sorted(facts["rank"].rpartition("/")[2] for facts in second.facts()) == ["0", "1"]
    assert first.generate() == second.generate() == expected
    assert sum(second.copied()) == sum(held(registry, first.instance())) > 0


def test_a_third_copies_from_both(engines: Engines, checkpoint: Checkpoint) -> None:
    model = checkpoint("llama", hidden=512, layers=8)
    first = engines.start(model, {})
    second = engines.start(model, {})
    third = engines.start(model, {})
    (facts,) = third.facts()
    assert facts["source"] == "peers"
    assert len(facts["sources"]) == 2
    assert facts["content"] == first.facts()[0]["content"] == second.facts()[0]["content"]
    assert third.generate() == first.generate()


@pytest.mark.parametrize("stage", ["loaded", "processed"])
def test_a_source_that_is_killed_in_the_middle_is_followed_by_the_disk(
    engines: Engines, checkpoint: Checkpoint, registry: Registry, stage: str
) -> None:
    model = checkpoint("llama", hidden=512, layers=8)
    first = engines.start(model, {"stage": stage}, patches=PLAIN)
    expected, instance = first.generate(), first.instance()
    with first.stopped(), ThreadPoolExecutor(1) as pool:
        starting = pool.submit(engines.start, model, {"stage": stage}, patches=PLAIN)
        wait_until(lambda: starting.done() or registry.all_pulls(instance) != (), 120)
        first.kill()
        second = starting.result(200)
    assert second.sources() == ["disk"]
    assert second.generate() == expected


def test_the_processed_memory_is_copied_as_it_is(
    engines: Engines, checkpoint: Checkpoint, registry: Registry
) -> None:
    model = checkpoint("llama")
    first = engines.start(model, {"stage": "processed"}, patches=PLAIN)
    second = engines.start(model, {"stage": "processed"}, patches=PLAIN)
    assert (first.sources(), second.sources()) == (["disk"], ["peers"])
    assert first.generate() == second.generate() == engines.start(model, patches=PLAIN).generate()
    assert sum(second.copied()) == sum(held(registry, first.instance())) > 0
    assert second.facts()[0]["extra_nbytes"] == 0


def test_weights_that_processing_hides_are_not_served_as_processed(
    engines: Engines, checkpoint: Checkpoint
) -> None:
    engine = engines.start(checkpoint("llama"), {"stage": "processed"}, patches=HIDDEN)
    assert engine.facts() == []
    (line,) = engine.warnings()
    assert "set `stage` to `loaded`" in line


@pytest.mark.parametrize("kind", ["llama-int8", "qwen3moe"])
def test_quantised_weights_and_experts_are_copied(
    engines: Engines, checkpoint: Checkpoint, registry: Registry, kind: str
) -> None:
    model = checkpoint(kind)
    expected = engines.start(model).generate()
    first = engines.start(model, {})
    second = engines.start(model, {})
    assert second.sources() == ["peers"]
    assert first.generate() == second.generate() == expected
    assert sum(second.copied()) == sum(held(registry, first.instance())) > 0


def test_the_stages_of_a_pipeline_are_copied(
    engines: Engines, checkpoint: Checkpoint, registry: Registry
) -> None:
    model = checkpoint("llama")
    patches = ("pipeline_buffers",)
    expected = engines.start(model, patches=patches, pipeline_parallel_size=2).generate()
    first = engines.start(model, {}, patches=patches, pipeline_parallel_size=2)
    second = engines.start(model, {}, patches=patches, pipeline_parallel_size=2)
    assert second.sources() == ["peers"] * 2
    assert first.generate() == second.generate() == expected
    assert sum(second.copied()) == sum(held(registry, first.instance())) > 0


def test_the_draft_of_speculative_decoding_is_copied_as_a_model_for_itself(
    engines: Engines, checkpoint: Checkpoint, registry: Registry
) -> None:
    model, draft = checkpoint("llama"), checkpoint("llama", layers=1)
    how = {"method": "draft_model", "model": draft, "num_speculative_tokens": 2}
    first = engines.start(model, {}, speculative_config=how)
    second = engines.start(model, {}, speculative_config=how)
    assert second.sources() == ["peers"] * 2
    drafts = [facts["rank"].endswith(".draft/0") for facts in second.facts()]
    assert sorted(drafts) == [False, True]
    assert first.generate() == second.generate()


def test_replicas_with_experts_of_their_own_are_instances(
    engines: Engines, checkpoint: Checkpoint
) -> None:
    """vLLM on CPUs cannot compute in this layout, so no token is generated."""
    model = checkpoint("qwen3moe")

    def start_two() -> list[dict[str, Any]]:
        port = free_port("127.0.0.1")

        def start(rank: int) -> Engine:
            env = {
                "VLLM_DP_RANK": str(rank),
                "VLLM_DP_RANK_LOCAL": str(rank),
                "VLLM_DP_SIZE": "2",
                "VLLM_DP_MASTER_IP": "127.0.0.1",
                "VLLM_DP_MASTER_PORT": str(port),
            }
            return engines.start(model, {}, env=env, enable_expert_parallel=True)

        with ThreadPoolExecutor(2) as pool:
            return [facts for engine in pool.map(start, (0, 1)) for facts in engine.facts()]

    first, second = start_two(), start_two()
    assert [facts["source"] for facts in first] == ["disk"] * 2  # each has other experts
    assert [facts["source"] for facts in second] == ["peers"] * 2
    instances = [facts["rank"].partition("/")[0] for facts in second]
    assert [name.rpartition(".")[2] for name in instances] == ["dp0", "dp1"]
    for ours, theirs in zip(second, first, strict=True):
        assert ours["content"] == theirs["content"]
    assert first[0]["content"] != first[1]["content"]


def test_an_adapter_is_the_same_on_weights_from_a_peer(
    engines: Engines, checkpoint: Checkpoint
) -> None:
    model, adapter = checkpoint("llama"), checkpoint("llama-lora")
    settings: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8}
    expected = engines.start(model, **settings).generate(adapter)
    first = engines.start(model, {}, **settings)
    assert first.generate(adapter) == expected != first.generate()
    second = engines.start(model, {}, **settings)  # while the first has its adapter
    assert second.sources() == ["peers"]
    assert second.generate(adapter) == expected
    assert second.generate() == first.generate()


def test_the_compile_cache_is_copied_and_used(
    engines: Engines, checkpoint: Checkpoint, registry: Registry, tmp_path: Path
) -> None:
    model = checkpoint("llama", layers=2)

    def start(name: str, ours: dict[str, Any]) -> Engine:
        env = {"VLLM_CACHE_ROOT": str(tmp_path / name)}
        return engines.start(model, ours, env=env, enforce_eager=False)

    first = start("first", {"artifacts": True})
    (compiled,) = first.ask("compile_caches")
    assert (compiled["fetched"], compiled["serves"]) == (0, True)
    assert compiled["added"] > 10
    (status,) = registry.instances("artifact=vllm")
    second = start("second", {"artifacts": True})
    (copied,) = second.ask("compile_caches")
    assert copied["fetched"] == compiled["added"]
    assert copied["sources"] == [status.records[0].key]
    assert copied["added"] < 3  # vLLM adds what says that it has looked, and compiles no kernel
    assert not kernels(tmp_path / "second") - kernels(tmp_path / "first")
    assert first.generate() == second.generate()
    assert second.lines("files of compile cache")


def kernels(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.so")}


def test_an_engine_that_does_not_compile_copies_no_compile_cache(
    engines: Engines, checkpoint: Checkpoint, registry: Registry
) -> None:
    engine = engines.start(checkpoint("llama"), {"artifacts": True})
    assert engine.ask("compile_caches") == []
    assert registry.instances("artifact") == ()
