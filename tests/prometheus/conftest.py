"""Debian's Prometheus, unpacked by `make test-prometheus`, before our rules and real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import (  # noqa: F401  fixtures
    _no_keeper_is_left,
    _ports_of_this_worker,
    namespace,
    processes,
    registry,
    shared_etcd,
)
from tests.support.checkout import ROOT

BINARIES = ROOT / ".prometheus" / "usr" / "bin"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.prometheus)


@pytest.fixture(scope="session")
def promtool() -> Path:
    return _binary("promtool")


@pytest.fixture(scope="session")
def prometheus() -> Path:
    return _binary("prometheus")


def _binary(name: str) -> Path:
    path = BINARIES / name
    assert path.is_file(), f"no {name} at {path}: `make test-prometheus` unpacks it"
    return path
