"""SGLang's own transfer between instances, with etcd in the place of its node 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine_loader import MooncakeEngine, load
from engine_registry import Registry
from engine_registry.gateway.server import Gateway
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


@pytest.mark.parametrize("layout", [{}, {"tp_size": 2}, {"pp_size": 2}], ids=["1", "tp2", "pp2"])
def test_seeds_register_in_etcd_and_clients_read_from_them_without_a_gateway(
    engines: Engines,
    registry: Registry,
    by_environment: dict[str, str],
    model: Path,
    layout: dict[str, Any],
) -> None:
    ranks = layout.get("tp_size", 1) * layout.get("pp_size", 1)
    first = engines.start(model, environment=by_environment, **(layout | seed()))
    expected = first.tokens()
    (status,) = registry.instances()
    assert [record.rank for record in status.records] == list(range(ranks))
    assert not first.lines("Registered transfer engine info")
    second = engines.start(model, environment=by_environment, **(layout | client() | seed()))
    assert len(second.lines("SGLang has copied its weights from")) == ranks
    assert second.tokens() == expected
    assert len(registry.instances()) == 2


def test_without_etcd_a_seed_registers_at_its_node_0_and_is_asked_there(
    engines: Engines, by_environment: dict[str, str], settings: dict[str, object], model: Path
) -> None:
    away = {"ENGINE_REGISTRY": json.dumps(settings | {"etcd": f"127.0.0.1:{free_port()}"})}
    first = engines.start(model, environment=away, **seed())
    assert len(first.lines("is no seed in etcd")) == 1
    assert len(first.lines("with bootstrap server")) == 1
    assert first.tokens() == engines.start(model).tokens()


def test_settings_that_are_not_valid_are_one_warning_a_process(
    engines: Engines, registry: Registry, model: Path
) -> None:
    wrong = {"ENGINE_REGISTRY": json.dumps({"etdc": "10.0.0.5:2379"})}
    engine = engines.start(model, environment=wrong, **seed())
    lines = engine.lines("engine_registry is not used in SGLang")
    assert lines
    assert all("unknown key: etdc: known are cacert" in line for line in lines)
    assert engine.lines("Registered transfer engine info")
    assert registry.instances() == ()


def test_an_update_of_a_seed_is_served_as_the_next_version(
    engines: Engines, registry: Registry, by_environment: dict[str, str], model: Path, trained: Path
) -> None:
    first = engines.start(model, environment=by_environment, **seed())
    succeeded, _, *_ = first.call("update_weights_from_disk", str(trained))
    assert succeeded
    (status,) = registry.instances()
    assert [record.version for record in status.records] == [1]
    second = engines.start(model, environment=by_environment, **client())
    assert second.lines("SGLang has copied its weights from")
    assert second.tokens() == first.tokens()


def test_a_loader_of_this_library_reads_from_a_seed_of_sglang(
    engines: Engines, registry: Registry, by_environment: dict[str, str], model: Path
) -> None:
    engines.start(model, environment=by_environment, **seed())
    (status,) = registry.instances()
    manifest = registry.manifest(status.records[0])
    tensors = {
        entry.name: torch.empty(entry.shape, dtype=torch.bfloat16) for entry in manifest.tensors
    }
    with MooncakeEngine("127.0.0.1") as engine:
        load(registry, engine, status.instance, rank=0, tensors=tensors)
    on_disk = load_file(model / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert torch.equal(tensors[name][: on_disk[name].shape[0]], on_disk[name])


def test_a_plain_sglang_reads_from_a_seed_through_the_gateway(
    engines: Engines, registry: Registry, by_environment: dict[str, str], model: Path
) -> None:
    first = engines.start(model, environment=by_environment, **seed())
    (status,) = registry.instances()
    with Gateway(registry, status.instance, world_size=1, port=0) as gateway:
        port = int(gateway.url.rpartition(":")[2])
        second = engines.start(
            model, **(client() | {"remote_instance_weight_loader_seed_instance_service_port": port})
        )
    assert second.tokens() == first.tokens()
