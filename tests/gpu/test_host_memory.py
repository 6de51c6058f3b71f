"""Arenas of the host over cuda_ipc: GPUs of other processes read them, and of the same one."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from engine_loader import (
    Arena,
    CudaIpcEngine,
    PublishOptions,
    arena_of,
    publish,
)
from engine_loader.errors import TensorsUnusable
from engine_loader.sharing import pinned
from engine_loader.sharing.pieces import is_on_host
from engine_registry import Registry
from tests.gpu.conftest import Source, assert_equal, fill, fill_and_kill, zeroed
from tests.gpu.source import MODEL, Tensors, content
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


def in_host_arena(number: int) -> Tensors:
    tensors = content(number, "cpu")
    arena_of(tensors).close()
    return tensors


def changed(number: int) -> Tensors:
    return {name: tensor + 1 for name, tensor in content(number).items()}


def mapped_arenas() -> int:
    """How many mappings of arenas this process has."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:arena")


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", None, "cpu"])
def test_an_arena_of_the_host_arrives_on_any_device_as_often_as_it_is_loaded(
    registry: Registry, source: Source, engine: CudaIpcEngine, device: str | None
) -> None:
    """Without a device: some tensors on each GPU."""
    before = mapped_arenas()
    source.do("host 1")
    exports = registry.manifest(registry.resolve("a")[0]).exports
    assert len(exports) == 3  # weights, header and digests
    assert all(map(is_on_host, exports))
    found = zeroed(content(1), device)
    for _ in range(2):
        report = fill(registry, engine, found, "auto")
        assert_equal(found, content(1))
        assert report.protocol == "cuda_ipc"
        assert not report.verified
        found = zeroed(content(1), device)
    source.do("update")
    assert fill(registry, engine, found).verified
    assert_equal(found, changed(1))
    assert mapped_arenas() - before == 3  # pinned once, whichever GPUs read


def test_weights_on_a_gpu_and_in_an_arena_of_the_host_arrive_together(
    registry: Registry, source: Source, engine: CudaIpcEngine
) -> None:
    source.do("both 1")
    exports = registry.manifest(registry.resolve("a")[0]).exports
    assert {is_on_host(one) for one in exports} == {True, False}
    for device in ("cuda:1", "cpu"):
        found = zeroed(content(1), device)
        assert fill(registry, engine, found).verified
        assert_equal(found, content(1))
    source.do("update")
    found = zeroed(content(1))
    assert fill(registry, engine, found).verified
    assert_equal(found, changed(1))


def test_tensors_that_lie_in_several_parts_that_are_pinned_arrive_whole(
    registry: Registry,
    source: Source,
    engine: CudaIpcEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pinned, "_PART_NBYTES", 2 << 20)
    source.do("host 1")
    for _ in range(2):
        found = zeroed(content(1))  # some tensors on each GPU
        fill(registry, engine, found, "auto")
        assert_equal(found, content(1))


@pytest.mark.parametrize("command", ["publish", "arena", "host"])
def test_an_arena_of_the_host_is_filled_from_any_memory(
    registry: Registry, source: Source, engine: CudaIpcEngine, command: str
) -> None:
    source.do(f"{command} 2")
    found = in_host_arena(0)
    for _ in range(2):
        assert fill(registry, engine, found).verified
        assert_equal(found, content(2))
        for tensor in found.values():
            tensor.zero_()


def test_a_load_reads_an_arena_to_the_end_whose_process_is_killed_and_lets_it_go(
    registry: Registry, source: Source, engine: CudaIpcEngine
) -> None:
    before = mapped_arenas()
    source.do("host 1")
    fill(registry, engine, zeroed(content(1), "cuda:1"), "auto")
    assert mapped_arenas() > before
    found = zeroed(content(1), "cuda:1")
    report = fill_and_kill(registry, engine, source, found)
    assert report.outlived == ("/engines/a/0",)
    assert_equal(found, content(1))
    wait_until(lambda: mapped_arenas() == before, timeout_s=30)
    assert torch.ones(8, device="cuda:1").sum() == 8


def test_gpus_read_an_arena_of_their_own_process_which_is_unpinned_when_it_is_gone(
    registry: Registry, engine: CudaIpcEngine
) -> None:
    before = mapped_arenas()
    weights = in_host_arena(3)
    with publish(
        registry,
        engine,
        instance="a",
        rank=0,
        world_size=1,
        tensors=weights,
        model=MODEL,
        options=PublishOptions(digests=True),
    ):
        for device in ("cuda:0", "cuda:1", "cpu"):
            found = zeroed(content(3), device)
            assert fill(registry, engine, found).verified
            assert_equal(found, content(3))
    weights.clear()
    wait_until(lambda: mapped_arenas() == before, timeout_s=30)


def test_memory_of_the_host_outside_of_arenas_is_refused_by_name(
    registry: Registry, engine: CudaIpcEngine
) -> None:
    with Arena("cpu", 4096) as arena:
        weights = {
            "in an arena": arena.empty((8,), torch.float32),
            "pinned": torch.zeros(8, pin_memory=True),
            "plain": torch.zeros(8),
        }
    with pytest.raises(TensorsUnusable, match="2 tensors cannot be opened") as caught:
        publish(registry, engine, instance="a", rank=0, world_size=1, tensors=weights, model=MODEL)
    assert caught.value.details["problems"] == ["pinned", "plain"]
    assert caught.value.remedy is not None
    assert "arena_of" in caught.value.remedy
