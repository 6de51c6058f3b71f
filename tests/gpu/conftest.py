"""A source on GPUs in another process, and what its tests share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from engine_loader import CudaIpcEngine, LoadReport, Progress, load
from engine_loader.options import LoadOptions, Verify
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd
from tests.gpu.source import Tensors
from tests.support.waiting import wait_until


class Source:
    def __init__(self, endpoint: str, protocol: str, **env: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.source", endpoint, protocol],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )
        self.pid = self._process.pid

    def do(self, command: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == f"{command}\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def etcd() -> Iterator[LocalEtcd]:
    with LocalEtcd() as etcd:
        yield etcd


@pytest.fixture
def registry(etcd: LocalEtcd) -> Iterator[Registry]:
    with Registry.connect(etcd.endpoint) as registry:
        yield registry


@pytest.fixture
def engine() -> Iterator[CudaIpcEngine]:
    with CudaIpcEngine() as engine:
        yield engine


@pytest.fixture
def source(etcd: LocalEtcd) -> Iterator[Source]:
    source = Source(etcd.endpoint, "cuda_ipc")
    yield source
    source.kill()


def fill(
    registry: Registry,
    engine: CudaIpcEngine,
    found: Tensors,
    verify: Verify = "digest",
    **options: object,
) -> LoadReport:
    """From what the source publishes now."""
    return load(
        registry,
        engine,
        "a",
        rank=0,
        tensors=found,
        timeout_s=0.0,
        options=LoadOptions(verify=verify, **options),  # type: ignore[arg-type]
    )


def fill_and_kill(
    registry: Registry, engine: CudaIpcEngine, source: Source, found: Tensors
) -> LoadReport:
    """The source is killed, and is not registered any more, when the first bytes have come."""
    ended = threading.Event()

    def kill(progress: Progress) -> None:
        if not ended.is_set():
            source.kill()
            wait_until(lambda: not registry.instances())
            ended.set()

    report = fill(registry, engine, found, progress=kill)
    assert ended.is_set()
    return report


def zeroed(tensors: Tensors, device: str | None = None) -> Tensors:
    return {name: torch.zeros_like(tensor, device=device) for name, tensor in tensors.items()}


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].cpu(), tensor.cpu()), name
