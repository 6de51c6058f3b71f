"""Memory of cuMemCreate goes by descriptors of the source's keeper: expandable segments of torch's,
whose tensors lie in many pieces, and arenas, which are one.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from engine_loader import CudaIpcEngine, Destination, load
from engine_loader.errors import LoaderError, SourceLost, TornRead
from engine_loader.options import Verify
from engine_loader.planning.plan import ReadOp
from engine_loader.publishing.header import peer_of_record
from engine_loader.sharing.pieces import Pieces, is_by_descriptors
from engine_registry import Manifest, Region, Registry
from engine_registry.errors import InstanceIncomplete, InstanceNotFound
from engine_registry.etcd.local import LocalEtcd
from tests.gpu.conftest import Source, assert_equal, fill, fill_and_kill, zeroed
from tests.gpu.source import Tensors, content, large_content
from tests.support.signals import signal_and_wait
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.fixture
def source(etcd: LocalEtcd) -> Iterator[Source]:
    source = Source(etcd.endpoint, "cuda_ipc", **EXPANDABLE)
    yield source
    source.kill()


@pytest.fixture
def plain(etcd: LocalEtcd) -> Iterator[Source]:
    """One whose torch takes memory of cudaMalloc."""
    source = Source(etcd.endpoint, "cuda_ipc")
    yield source
    source.kill()


def manifest_of(registry: Registry) -> Manifest:
    return registry.manifest(registry.resolve("a")[0])


def assert_equal_here(found: Tensors, number: int) -> None:
    """Of large ones, one by one: all of them at once would take too much memory."""
    for name, tensor in found.items():
        start = 1000 * number + int(name.removeprefix("large"))
        wanted = torch.arange(
            start, start + tensor.numel(), dtype=torch.int32, device=tensor.device
        )
        assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", None, "cpu"])
def test_weights_in_expandable_segments_arrive_on_any_device_as_often_as_they_are_loaded(
    registry: Registry, source: Source, engine: CudaIpcEngine, device: str | None
) -> None:
    source.do("publish 1")
    assert all(map(is_by_descriptors, manifest_of(registry).exports))
    verify: Verify
    for verify in ("header", "digest", "header"):
        found = zeroed(content(1), device)
        report = fill(registry, engine, found, verify)
        assert_equal(found, content(1))
        assert report.protocol == "cuda_ipc"


def test_tensors_that_lie_in_several_pieces_arrive_whole(
    registry: Registry, source: Source, engine: CudaIpcEngine
) -> None:
    source.do("large 3")
    exports = manifest_of(registry).exports
    assert len(exports) < 20
    assert sum(export.nbytes for export in exports) > 100 * (30 << 20)
    for device in ("cuda:0", "cuda:1"):
        found = {
            f"large{place}": torch.zeros(30 << 18, dtype=torch.int32, device=device)
            for place in range(100)
        }
        assert fill(registry, engine, found).verified
        assert_equal_here(found, 3)


def test_a_source_that_is_stopped_is_met_and_read(
    registry: Registry, source: Source, engine: CudaIpcEngine
) -> None:
    source.do("publish 1")
    signal_and_wait(source.pid, signal.SIGSTOP)
    found = zeroed(content(1), "cuda:1")
    assert fill(registry, engine, found).verified
    assert_equal(found, content(1))


def test_weights_that_change_are_loaded_in_one_version(
    registry: Registry, source: Source, engine: CudaIpcEngine
) -> None:
    source.do("publish 0")
    ended = threading.Event()

    def update() -> None:
        for _ in range(20):
            source.do("update")
        ended.set()

    updates = threading.Thread(target=update)
    updates.start()
    found = zeroed(content(0), "cuda:1")
    versions: list[int] = []
    while not ended.is_set() or not versions:
        with suppress(TornRead):
            versions.append(
                load(registry, engine, "a", rank=0, tensors=found, timeout_s=60).version
            )
            assert_equal(
                found, {name: tensor + versions[-1] for name, tensor in content(0).items()}
            )
    updates.join()


def test_a_paused_rank_frees_its_memory_and_serves_others_later(
    registry: Registry, source: Source, engine: CudaIpcEngine
) -> None:
    """Neither the rank nor its keeper keeps the memory by a descriptor."""
    torch.zeros(1, device="cuda:0")
    source.do("large 1")
    free, _ = torch.cuda.mem_get_info(0)
    source.do("pause")
    source.do("replace 2")  # frees what there was
    wait_until(lambda: torch.cuda.mem_get_info(0)[0] > free + (2 << 30), timeout_s=30)
    found = zeroed(content(2), "cuda:1")
    fill(registry, engine, found)
    assert_equal(found, content(2))


def test_a_load_reads_a_source_to_the_end_that_is_killed_and_lets_its_memory_go(
    registry: Registry, engine: CudaIpcEngine, source: Source
) -> None:
    torch.zeros(1, device="cuda:0")
    free, _ = torch.cuda.mem_get_info(0)
    source.do("publish 1")
    fill(registry, engine, zeroed(content(1), "cuda:1"))
    found = zeroed(content(1), "cuda:1")
    report = fill_and_kill(registry, engine, source, found)
    assert report.outlived == ("/engines/a/0",)
    assert report.verified
    assert_equal(found, content(1))
    del found
    torch.cuda.empty_cache()
    wait_until(lambda: torch.cuda.mem_get_info(0)[0] >= free, timeout_s=30)


def test_a_kill_at_any_moment_leaves_exact_weights_or_an_error_and_a_gpu_that_works(
    etcd: LocalEtcd, registry: Registry, engine: CudaIpcEngine
) -> None:
    destination = Destination(zeroed(large_content(0), "cuda:1"))
    for number in range(1, 6):
        source = Source(etcd.endpoint, "cuda_ipc", **EXPANDABLE)
        source.do(f"large {number}")
        killer = threading.Timer(random.uniform(0.0, 0.05), source.kill)
        killer.start()
        try:
            fill(registry, engine, dict(destination))
            assert_equal_here(dict(destination), number)
        except (SourceLost, InstanceNotFound, InstanceIncomplete):
            pass
        except LoaderError as exc:
            pytest.fail(f"a load ended with {exc!r}")
        finally:
            killer.join()
        assert torch.ones(8, device="cuda:1").sum() == 8
        wait_until(lambda: not registry.instances())


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "cpu"])
def test_weights_in_an_arena_are_one_descriptor_and_arrive_on_any_device(
    registry: Registry, plain: Source, engine: CudaIpcEngine, device: str
) -> None:
    plain.do("arena 1")
    manifest = manifest_of(registry)
    assert len(manifest.regions) == 1
    assert all(map(is_by_descriptors, manifest.exports))  # of header and digests too
    assert sum(len(Pieces.decode(export).sizes) for export in manifest.exports) == 3
    for added in range(2):
        found = zeroed(content(1), device)
        assert fill(registry, engine, found).verified
        assert_equal(found, {name: one + added for name, one in content(1).items()})
        plain.do("update")


def test_an_arena_of_a_rank_that_was_killed_is_opened_as_long_as_its_keeper_lives(
    etcd: LocalEtcd, registry: Registry, plain: Source, engine: CudaIpcEngine
) -> None:
    """The keeper cannot write the end of the rank to an etcd that does not answer."""
    torch.zeros(1, device="cuda:0")
    free, _ = torch.cuda.mem_get_info(0)
    plain.do("arena 5")
    (record,) = registry.resolve("a")
    manifest = registry.manifest(record)
    etcd.pause()
    plain.kill()
    peer = peer_of_record(record)
    engine.connect(peer, manifest.exports)
    wanted = content(5)
    for entry in manifest.tensors:
        found = torch.zeros_like(wanted[entry.name], device="cuda:1")
        region = Region(found.data_ptr(), found.nbytes)
        engine.lend(region)
        number = engine.start(peer, ReadOp(record.key, entry.addr, *region))
        wait_until(lambda number=number: engine.done(number))  # type: ignore[misc]
        engine.take_back(region)
        assert torch.equal(found.cpu(), wanted[entry.name].cpu()), entry.name
    del found, wanted
    torch.cuda.empty_cache()
    etcd.resume()
    wait_until(lambda: torch.cuda.mem_get_info(0)[0] >= free, timeout_s=60)
