"""Snapshots of weights on a GPU: in the host's memory, and on the GPU; followed by deltas there."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from engine_loader import (
    Engine,
    LoadOptions,
    PublishOptions,
    Replica,
    Snapshots,
    SocketEngine,
    load,
    open_engine,
    publish,
)
from engine_loader.engines.protocols import usable_protocols
from engine_registry import ModelIdentity, Registry
from tests.gpu.conftest import assert_equal, zeroed
from tests.gpu.source import Tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MODEL = ModelIdentity("m")


def weights() -> Tensors:
    torch.manual_seed(0)
    return {
        "long": torch.randn(3000, 1024, device="cuda").to(torch.bfloat16),
        "bytes": torch.randint(256, (5_000_001,), dtype=torch.uint8, device="cuda"),
        "column": torch.randn(512, 384, device="cuda").t(),
        "short": torch.randn(7, device="cuda"),
    }


def train(tensors: Tensors) -> None:
    for tensor in tensors.values():
        chosen = torch.rand(tensor.shape, device="cuda") < 0.02
        tensor[chosen] += 1


def follow(
    registry: Registry, engines: tuple[Engine, Engine], device: str | None, into: str
) -> None:
    """The reader has each version exactly, and reads nothing but deltas."""
    tensors = weights()
    found = zeroed(tensors, into)
    with publish(
        registry,
        engines[0],
        instance="t",
        rank=0,
        world_size=1,
        tensors=tensors,
        model=MODEL,
        options=PublishOptions(digests=True, snapshots=Snapshots(device=device, deltas=2)),
    ) as publication:
        report = load(registry, engines[1], "t", rank=0, tensors=found)
        for version in range(1, 4):
            assert_equal(found, tensors)
            train(tensors)
            before = {name: tensor.clone() for name, tensor in tensors.items()}
            publication.snapshot(wait=False)
            train(tensors)  # while digests and the delta are made
            publication._served.ring.finish()  # type: ignore[union-attr]
            report = load(
                registry,
                engines[1],
                "t",
                rank=0,
                tensors=found,
                options=LoadOptions(base=report.contents, verify="digest"),
            )
            assert_equal(found, before)
            assert (report.version, report.read_nbytes) == (2 * version - 1, 0)
            assert 0 < report.delta_nbytes < 0.1 * report.nbytes
            publication.snapshot()
            report = load(registry, engines[1], "t", rank=0, tensors=found)
            assert report.version == 2 * version


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_reader_on_the_host_follows_a_trainer_on_a_gpu(
    registry: Registry, device: str | None
) -> None:
    with SocketEngine("127.0.0.1") as source, SocketEngine("127.0.0.1") as reader:
        follow(registry, (source, reader), device, "cpu")


def test_only_what_has_changed_has_new_digests(registry: Registry) -> None:
    """They are those of the tensors on the GPU, and have to be those of the copies."""
    tensors = weights()
    found = zeroed(tensors, "cpu")
    with (
        SocketEngine("127.0.0.1") as source,
        SocketEngine("127.0.0.1") as reader,
        publish(
            registry,
            source,
            instance="t",
            rank=0,
            world_size=1,
            tensors=tensors,
            model=MODEL,
            options=PublishOptions(digests=True, snapshots=2),
        ) as publication,
    ):
        for name in ("long", "short", "bytes", "column"):
            tensors[name].zero_()
            publication.snapshot(changed=[name])
            options = LoadOptions(verify="digest")
            load(registry, reader, "t", rank=0, tensors=found, options=options)
            assert_equal(found, tensors)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_reader_on_a_gpu_follows_snapshots_on_another(registry: Registry) -> None:
    if "cuda_ipc" not in usable_protocols():
        pytest.skip("this machine has no cuda_ipc")
    with (
        open_engine("127.0.0.1", "cuda_ipc") as source,
        open_engine("127.0.0.1", "cuda_ipc") as reader,
    ):
        follow(registry, (source, reader), None, "cuda:1")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_replica_on_a_gpu_passes_deltas_on(registry: Registry) -> None:
    if "cuda_ipc" not in usable_protocols():
        pytest.skip("this machine has no cuda_ipc")
    tensors = weights()
    ours, theirs = zeroed(tensors, "cuda:1"), zeroed(tensors)
    with ExitStack() as stack:
        engines = [stack.enter_context(open_engine("127.0.0.1", "cuda_ipc")) for _ in range(3)]
        trainer = stack.enter_context(
            publish(
                registry,
                engines[0],
                instance="t",
                rank=0,
                world_size=1,
                tensors=tensors,
                model=MODEL,
                options=PublishOptions(snapshots=Snapshots(deltas=2)),
            )
        )
        replica = Replica("r", options=PublishOptions(deltas=2))
        report = load(registry, engines[1], "t", rank=0, tensors=ours, publish=replica)
        assert report.publication is not None
        publication = stack.enter_context(report.publication)
        last = load(registry, engines[2], "r", rank=0, tensors=theirs)
        for _ in range(3):
            train(tensors)
            trainer.snapshot()
            options = LoadOptions(base=report.contents)
            with publication.update():
                report = load(registry, engines[1], "t", rank=0, tensors=ours, options=options)
            assert publication.content == trainer.content
            options = LoadOptions(base=last.contents)
            last = load(registry, engines[2], "r", rank=0, tensors=theirs, options=options)
            assert_equal(theirs, tensors)
            assert last.read_nbytes == 0
            assert 0 < last.delta_nbytes == report.delta_nbytes < 0.1 * last.nbytes
