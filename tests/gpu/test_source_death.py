"""Over cuda_ipc a source may end while it is read: its memory stays as long as it is mapped."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from engine_loader import CudaIpcEngine, Destination
from engine_loader.errors import LoaderError, SourceLost
from engine_registry import Registry
from engine_registry.errors import InstanceIncomplete, InstanceNotFound
from engine_registry.etcd.local import LocalEtcd
from tests.gpu.conftest import Source, assert_equal, fill, fill_and_kill, zeroed
from tests.gpu.source import content
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


def test_a_load_reads_a_source_to_the_end_that_is_killed_when_its_memory_is_mapped(
    registry: Registry, engine: CudaIpcEngine, source: Source
) -> None:
    source.do("publish 1")
    fill(registry, engine, zeroed(content(1), "cuda:1"))
    found = zeroed(content(1), "cuda:1")
    report = fill_and_kill(registry, engine, source, found)
    assert report.outlived == ("/engines/a/0",)
    assert report.verified
    assert_equal(found, content(1))
    with pytest.raises((InstanceNotFound, InstanceIncomplete)):
        fill(registry, engine, found)


def test_the_memory_of_a_source_that_has_ended_is_let_go(
    registry: Registry, engine: CudaIpcEngine, source: Source
) -> None:
    torch.zeros(1, device="cuda:0")
    free, _ = torch.cuda.mem_get_info(0)
    source.do("publish 1")
    fill(registry, engine, zeroed(content(1), "cuda:1"))
    assert torch.cuda.mem_get_info(0)[0] < free
    source.kill()
    wait_until(lambda: torch.cuda.mem_get_info(0)[0] >= free, timeout_s=30)


def test_a_kill_at_any_moment_of_a_load_leaves_exact_weights_or_an_error_and_a_gpu_that_works(
    etcd: LocalEtcd, registry: Registry, engine: CudaIpcEngine
) -> None:
    destination = Destination(zeroed(content(0), "cuda:1"))
    for number in range(1, 6):
        source = Source(etcd.endpoint, "cuda_ipc")
        source.do(f"publish {number}")
        killer = threading.Timer(random.uniform(0.0, 0.05), source.kill)
        killer.start()
        try:
            fill(registry, engine, dict(destination))
            assert_equal(dict(destination), content(number))
        except (SourceLost, InstanceNotFound, InstanceIncomplete):
            pass
        except LoaderError as exc:
            pytest.fail(f"a load ended with {exc!r}")
        finally:
            killer.join()
        assert torch.ones(8, device="cuda:1").sum() == 8
        wait_until(lambda: not registry.instances())
