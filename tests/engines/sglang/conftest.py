"""One process that has imported SGLang for all tests here, and an etcd namespace for each."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd
from tests.engines.sglang.checkpoint import write_checkpoint
from tests.engines.sglang.engines import VENV, Engines


@pytest.fixture(scope="session")
def etcd() -> Iterator[LocalEtcd]:
    with LocalEtcd() as etcd:
        yield etcd


@pytest.fixture(scope="session")
def all_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    if not (VENV / "bin" / "python").exists():
        pytest.fail("SGLang is not installed: run `make test-engines`, which installs it")
    engines = Engines(tmp_path_factory.mktemp("sglang"))
    yield engines
    engines.close()


@pytest.fixture
def engines(all_engines: Engines) -> Iterator[Engines]:
    yield all_engines
    all_engines.close_engines()


@pytest.fixture
def namespace() -> str:
    return f"/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def registry(etcd: LocalEtcd, namespace: str) -> Iterator[Registry]:
    with Registry.connect(etcd.endpoint, namespace=namespace) as registry:
        yield registry


@pytest.fixture
def settings(etcd: LocalEtcd, namespace: str) -> dict[str, object]:
    """What a user gives as `--model-loader-extra-config`."""
    return {"etcd": etcd.endpoint, "namespace": namespace, "host": "127.0.0.1", "model": "llama"}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "llama", seed=0)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model after some training."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "trained", seed=7)
