"""LoadOptions and PublishOptions: what they check, and which call refuses which of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch

from engine_loader import (
    Destination,
    EngineReader,
    InProcessEngine,
    LoadOptions,
    Pace,
    PublishOptions,
    Replica,
    Shard,
    Snapshots,
    load,
    load_full,
    load_instance,
    load_or_seed,
    publish,
    publish_state_dict,
    read_catalogue,
)
from engine_loader.options import number_of, refuse
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import InvalidField
from engine_registry.etcd.config import EtcdConfig, parse_endpoints

MODEL = ModelIdentity("m")
CONTENT = "0123456789abcdef" * 2
OTHER_THAN_DEFAULT: dict[str, Any] = {
    "snapshots": Snapshots(count=3),
    "verify": "digest",
    "version": 3,
    "contents": [CONTENT],
    "base": [CONTENT],
    "max_sources": 1,
    "partial": True,
    "reuse": True,
    "also_from": ["base"],
    "pipelined": False,
    "pace": Pace(1 << 20, 2),
    "progress": print,
    "cancel": threading.Event(),
    "generation": "g",
    "digests": True,
    "labels": {"team": "search"},
    "values": {"step": 3},
    "ttl_s": 3.0,
    "unresponsive_after_s": 5.0,
    "on_state": print,
    "deltas": 3,
    "changed": 0.5,
    "hold_s": 60.0,
}


@pytest.mark.parametrize("kind", [LoadOptions, PublishOptions])
def test_each_option_can_be_given_and_none_can_be_changed(kind: type[Any]) -> None:
    names = [field.name for field in fields(kind)]
    for name in names:
        given = kind(**{name: OTHER_THAN_DEFAULT[name]})
        assert getattr(given, name) != getattr(kind(), name), name
        with pytest.raises(FrozenInstanceError):
            setattr(given, name, None)
        assert replace(given) == given


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (LoadOptions, "verify", "md5"),
        (LoadOptions, "version", -1),
        (LoadOptions, "version", "7"),
        (LoadOptions, "contents", CONTENT),
        (LoadOptions, "contents", ["x"]),
        (LoadOptions, "contents", 5),
        (LoadOptions, "max_sources", 0),
        (LoadOptions, "partial", None),
        (LoadOptions, "partial", "yes"),
        (LoadOptions, "reuse", 1),
        (LoadOptions, "also_from", True),
        (LoadOptions, "also_from", []),
        (LoadOptions, "also_from", ["a/b"]),
        (LoadOptions, "also_from", [3]),
        (LoadOptions, "pipelined", 1),
        (LoadOptions, "pace", 5),
        (LoadOptions, "progress", "bar"),
        (LoadOptions, "cancel", True),
        (PublishOptions, "snapshots", 1),
        (PublishOptions, "snapshots", 9),
        (PublishOptions, "snapshots", "two"),
        (Snapshots, "count", 1),
        (Snapshots, "count", 2.5),
        (Snapshots, "device", 0),
        (Snapshots, "retain_s", -1),
        (Snapshots, "buffers", [b"x"]),
        (Snapshots, "deltas", -1),
        (Snapshots, "changed", 0),
        (Snapshots, "changed", 1.5),
        (LoadOptions, "base", "x"),
        (LoadOptions, "base", ["x"]),
        (PublishOptions, "generation", "a\nb"),
        (PublishOptions, "generation", 5),
        (PublishOptions, "version", 1.5),
        (PublishOptions, "labels", ["team"]),
        (PublishOptions, "digests", "yes"),
        (PublishOptions, "values", [1]),
        (PublishOptions, "deltas", -1),
        (PublishOptions, "deltas", 65),
        (PublishOptions, "changed", True),
        (PublishOptions, "changed", 0.0),
        (PublishOptions, "ttl_s", 1.0),
        (PublishOptions, "ttl_s", "10"),
        (PublishOptions, "on_state", 5),
    ],
)
def test_an_option_that_is_not_valid_is_refused_by_name_when_it_is_given(
    kind: type[Any], field: str, value: Any
) -> None:
    with pytest.raises(InvalidField, match=field) as caught:
        kind(**{field: value})
    assert caught.value.details["field"] == field


def test_deltas_need_digests_and_are_not_of_snapshots() -> None:
    with pytest.raises(InvalidField, match="needed for deltas"):
        PublishOptions(deltas=1, digests=False)
    with pytest.raises(InvalidField, match=r"say `Snapshots\(deltas=…\)`") as caught:
        PublishOptions(deltas=1, snapshots=2)
    assert caught.value.details["field"] == "deltas"


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="max_source"):
        LoadOptions(max_source=3)  # type: ignore[call-arg]


def test_a_mapping_of_values_is_taken_as_it_is() -> None:
    values = {"step": 3}
    assert PublishOptions(values=values).values is values


REFUSED = {
    "load_instance": {"version", "contents"},
    "load_full": {"version", "contents", "partial", "reuse", "base"},
    "read_catalogue": {"partial", "reuse", "base"},
    "EngineReader": {"version", "contents", "partial"},
    "load_or_seed": {"version", "contents"},
    "publish_state_dict": {"values"},
    "Replica": {"version"},
}


@pytest.fixture
def registry() -> Iterator[Registry]:
    """Of an etcd that is not there."""
    with Registry(EtcdConfig(parse_endpoints("fake:1"))) as registry:
        yield registry


@pytest.fixture
def calls(registry: Registry) -> dict[str, Callable[[Any], Any]]:
    """Calls that refuse some options before they look at etcd."""
    engine = InProcessEngine()
    tensors = {"w": torch.zeros(3)}
    where: dict[str, Any] = {"rank": 0, "world_size": 1, "instance": "a"}
    return {
        "load_instance": lambda options: load_instance(
            registry, engine, "a", tensors={0: tensors}, options=options
        ),
        "load_full": lambda options: load_full(registry, engine, "a", options=options),
        "read_catalogue": lambda options: read_catalogue(registry, engine, "a", options=options),
        "EngineReader": lambda options: EngineReader(registry, engine, "a", options=options),
        "load_or_seed": lambda options: load_or_seed(
            registry, engine, MODEL, tensors, **where, fallback="nowhere", load=options
        ),
        "publish_state_dict": lambda options: publish_state_dict(
            registry, engine, tensors, **where, model=MODEL, options=options
        ),
        "Replica": lambda options: Replica("a", options=options),
    }


@pytest.mark.parametrize(
    ("call", "name"), [(call, name) for call, names in REFUSED.items() for name in sorted(names)]
)
def test_an_option_that_a_call_cannot_honour_is_refused_by_name(
    calls: dict[str, Callable[[Any], Any]], call: str, name: str
) -> None:
    kind = PublishOptions if call in ("publish_state_dict", "Replica") else LoadOptions
    with pytest.raises(
        InvalidField, match=f"^{call} does not take the option `{name}`: "
    ) as caught:
        calls[call](kind(**{name: OTHER_THAN_DEFAULT[name]}))
    assert caught.value.details["field"] == name


@pytest.mark.parametrize(
    ("field", "value"), [("world_size", 2), ("topology", {"tp": (0, 2)})], ids=["size", "topology"]
)
def test_a_place_without_its_rank_is_refused(registry: Registry, field: str, value: Any) -> None:
    engine = InProcessEngine()
    with pytest.raises(InvalidField, match=f"`{field}` is given without the rank"):
        load(registry, engine, "a", tensors={"w": torch.zeros(3)}, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("instance", "a b"),
        ("rank", -1),
        ("rank", 2),
        ("world_size", 0),
        ("topology", {"tp": (2, 2)}),
    ],
)
def test_a_replica_that_cannot_be_is_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidField) as caught:
        Replica(**{"instance": "a", "rank": 0, "world_size": 2, field: value})
    assert caught.value.details["field"] == field


def test_a_call_that_chooses_the_version_itself_takes_the_released_one_all_the_same() -> None:
    refuse(LoadOptions(version="released"), "load_full", {"version": "leave it out"})
    assert number_of(LoadOptions(version="released")) is None
    assert number_of(LoadOptions(version=3)) == 3


@pytest.mark.parametrize("value", [None, 5, ModelIdentity("m")])
def test_a_replica_is_a_name_a_replica_or_true(registry: Registry, value: Any) -> None:
    engine = InProcessEngine()
    with pytest.raises(InvalidField, match=r"`publish` .* is not valid: give the name"):
        load(registry, engine, "a", rank=0, tensors={"w": torch.zeros(3)}, publish=value)


@pytest.mark.parametrize("call", ["load", "publish", "load_or_seed"])
def test_shards_beside_a_destination_are_refused(registry: Registry, call: str) -> None:
    engine = InProcessEngine()
    given: dict[str, Any] = {
        "shards": {"w": Shard((6,), (0,))},
        "rank": 0,
        "world_size": 1,
    }
    destination = Destination({"w": torch.zeros(3)})
    calls: dict[str, Callable[[], Any]] = {
        "load": lambda: load(registry, engine, "a", tensors=destination, **given),
        "publish": lambda: publish(
            registry, engine, instance="a", tensors=destination, model=MODEL, **given
        ),
        "load_or_seed": lambda: load_or_seed(
            registry, engine, MODEL, destination, instance="a", fallback="nowhere", **given
        ),
    }
    with pytest.raises(InvalidField, match="a Destination says which boxes") as caught:
        calls[call]()
    assert caught.value.details["field"] == "shards"
