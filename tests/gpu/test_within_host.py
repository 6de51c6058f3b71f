"""From GPU to GPU of one host, each way: two processes, real engines and etcd."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from engine_loader import Engine, LoadOptions, load, open_engine, publish
from engine_loader.engines.protocols import usable_protocols
from engine_loader.errors import TensorsUnusable, TornRead
from engine_loader.options import Verify
from engine_registry import Registry
from engine_registry.errors import InstanceIncomplete
from engine_registry.etcd.local import LocalEtcd
from tests.gpu.conftest import Source, assert_equal, zeroed
from tests.gpu.source import MODEL, content, late_content

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


@pytest.fixture(params=["cuda_ipc", "nvlink_intra"])
def protocol(request: pytest.FixtureRequest) -> str:
    protocol: str = request.param
    if protocol not in usable_protocols():
        pytest.skip(f"this machine has no {protocol}")
    return protocol


@pytest.fixture
def source(etcd: LocalEtcd, protocol: str) -> Iterator[Source]:
    source = Source(etcd.endpoint, protocol)
    yield source
    source.kill()


@pytest.fixture
def engine(protocol: str) -> Iterator[Engine]:
    with open_engine("127.0.0.1", protocol) as engine:
        yield engine


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", None, "cpu"])
def test_weights_arrive_on_any_device_and_as_often_as_they_are_loaded(
    registry: Registry, source: Source, engine: Engine, device: str | None
) -> None:
    source.do("publish 1")
    verify: Verify
    for verify in ("header", "digest", "header"):
        found = zeroed(content(1), device)
        report = load(
            registry, engine, "a", rank=0, tensors=found, options=LoadOptions(verify=verify)
        )
        assert_equal(found, content(1))
        assert report.protocol == engine.protocol


def test_blocks_that_a_gpu_holds_already_are_not_read(
    registry: Registry, source: Source, engine: Engine
) -> None:
    source.do("publish 1")
    found = zeroed(content(1), "cuda:1")
    load(registry, engine, "a", rank=0, tensors=found)
    found["t3"].add_(1)
    found["long"][-1] ^= 1
    report = load(registry, engine, "a", rank=0, tensors=found, options=LoadOptions(reuse=True))
    assert_equal(found, content(1))
    assert report.read_nbytes == found["t3"].nbytes + (4 << 20)


def test_memory_that_a_process_publishes_later_is_not_taken_for_what_lay_there_before(
    registry: Registry, source: Source, engine: Engine
) -> None:
    for number in (1, 2, 3):
        source.do(f"publish {number}")
        found = zeroed(content(number), "cuda:1")
        load(registry, engine, "a", rank=0, tensors=found)
        assert_equal(found, content(number))
        source.do(f"late {number}")
        late = zeroed(late_content(number), "cuda:1")
        load(registry, engine, "late", rank=0, tensors=late)
        assert_equal(late, late_content(number))


def test_weights_that_change_on_another_stream_are_loaded_in_one_version(
    registry: Registry, source: Source, engine: Engine
) -> None:
    source.do("publish 0")
    ended = threading.Event()

    def update() -> None:
        for _ in range(50):
            source.do("update")
        ended.set()

    updates = threading.Thread(target=update)
    updates.start()
    found = zeroed(content(0), "cuda:1")
    versions: list[int] = []
    while not ended.is_set() or not versions:
        with suppress(TornRead):
            versions.append(load(registry, engine, "a", rank=0, tensors=found).version)
            assert_equal(
                found, {name: tensor + versions[-1] for name, tensor in content(0).items()}
            )
    updates.join()


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_paused_rank_frees_its_memory_and_serves_the_same_or_other_weights_later(
    registry: Registry, source: Source, engine: Engine, device: str
) -> None:
    source.do("publish 1")
    options = LoadOptions(verify="digest")
    contents: list[str] = []
    for version, number in enumerate((1, 2, 3)):
        if version:
            source.do("pause")
            source.do(f"replace {number}")  # often at the addresses of those before
        for _ in range(2):
            found = zeroed(content(number), device)
            report = load(registry, engine, "a", rank=0, tensors=found, options=options)
            assert_equal(found, content(number))
            assert report.version == version
            contents.append(report.content)
            source.do("pause")
            with pytest.raises(InstanceIncomplete, match="rank 0 updating"):
                load(registry, engine, "a", rank=0, tensors=found, timeout_s=0.0)
            source.do("resume")
    assert contents[::2] == contents[1::2]
    assert len(set(contents)) == 3


def test_what_was_loaded_from_gpu_to_gpu_is_a_source_itself(
    etcd: LocalEtcd, registry: Registry, source: Source, engine: Engine
) -> None:
    source.do("publish 1")
    replica = Source(etcd.endpoint, engine.protocol)
    try:
        replica.do("copy 1")
        source.kill()
        verify: Verify
        for verify in ("header", "digest"):
            found = zeroed(content(1), "cuda:1")
            report = load(
                registry, engine, "copy", rank=0, tensors=found, options=LoadOptions(verify=verify)
            )
            assert_equal(found, content(1))
            assert [share.name for share in report.shares] == ["/engines/copy/0"]
        replica.do("update")
        found = zeroed(content(1), "cuda:1")
        assert load(registry, engine, "copy", rank=0, tensors=found).version == 1
        assert_equal(found, {name: tensor + 1 for name, tensor in content(1).items()})
    finally:
        replica.kill()


def test_memory_that_no_other_process_can_open_is_refused_by_name(
    registry: Registry, engine: Engine
) -> None:
    tensors = {"here": torch.zeros(10, device="cuda:0"), "there": torch.zeros(10)}
    with pytest.raises(
        TensorsUnusable,
        match=r"1 tensors cannot be opened by other processes over .*: there: ",
    ):
        publish(registry, engine, instance="a", rank=0, world_size=1, tensors=tensors, model=MODEL)
    assert registry.instances() == ()
