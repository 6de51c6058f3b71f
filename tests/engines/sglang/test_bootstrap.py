"""SGLang's own transfer between instances, with etcd in the place of its node 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine_registry import Registry
from tests.engines.sglang.engines import Engines, free_port

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]


@pytest.fixture
def by_environment(settings: dict[str, object]) -> dict[str, str]:
    return {"ENGINE_REGISTRY": json.dumps(settings)}


def seed() -> dict[str, Any]:
    return {
        "remote_instance_weight_loader_start_seed_via_transfer_engine": True,
        "engine_info_bootstrap_port": free_port(),
    }


def client() -> dict[str, Any]:
    """Nobody listens at the seed's address: only etcd can answer."""
    return {
        "load_format": "remote_instance",
        "remote_instance_weight_loader_backend": "transfer_engine",
        "remote_instance_weight_loader_seed_instance_ip": "127.0.0.1",
        "remote_instance_weight_loader_seed_instance_service_port": free_port(),
    }


@pytest.mark.parametrize("tp_size", [1, 2])
def test_seeds_register_in_etcd_and_clients_read_from_them_without_a_gateway(
    engines: Engines,
    registry: Registry,
    by_environment: dict[str, str],
    model: Path,
    tp_size: int,
) -> None:
    first = engines.start(model, environment=by_environment, tp_size=tp_size, **seed())
    expected = first.tokens()
    (status,) = registry.instances()
    assert [record.rank for record in status.records] == list(range(tp_size))
    assert not first.lines("Registered transfer engine info")
    second = engines.start(
        model, environment=by_environment, tp_size=tp_size, **(client() | seed())
    )
    assert len(second.lines("SGLang has copied its weights from")) == tp_size
    assert second.tokens() == expected
    assert len(registry.instances()) == 2
