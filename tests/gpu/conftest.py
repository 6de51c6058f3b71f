"""A source on GPUs in another process, and what its tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd
from tests.gpu.source import Tensors


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


def zeroed(tensors: Tensors, device: str | None = None) -> Tensors:
    return {name: torch.zeros_like(tensor, device=device) for name, tensor in tensors.items()}


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].cpu(), tensor.cpu()), name
