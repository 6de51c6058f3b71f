"""Numbers of any type that stands for one are taken, all else is refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from engine_loader import (
    InProcessEngine,
    Shard,
    load,
    load_full,
    load_instance,
    load_module,
    load_or_seed,
    publish,
    read_catalogue,
)
from engine_loader.errors import TensorsUnusable
from engine_registry import ModelIdentity, Place, Registry
from engine_registry.errors import InvalidField
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.schema.keys import check_rank
from engine_registry.schema.numbers import seconds, whole
from engine_registry.schema.record_format import decode, encode
from tests.support.builders import a_record
from tests.support.options import for_load, for_publish, for_start

TWO = [2, np.int32(2), np.uint64(2), np.array(2), torch.tensor(2)]
NOT_WHOLE = [
    True,
    np.True_,
    2.0,
    "2",
    b"2",
    None,
    [2],
    np.float32(2),
    torch.tensor([2, 3]),
    math.nan,
]
NO_TIME = [math.nan, math.inf, -1, -math.inf, "5", b"5", None, True, [5], 1e10, 10**400]
MODEL = ModelIdentity("m")


@pytest.mark.parametrize("two", TWO, ids=repr)
def test_what_stands_for_a_whole_number_becomes_pythons(two: Any) -> None:
    assert type(whole("rank", two)) is int
    assert check_rank(two, np.int64(3)) == (2, 3)
    sizes: Any = [two, 4]
    assert Shard(sizes, torch.Size((2, 0))) == Shard((2, 4), (2, 0))
    axis: Any = [two, np.int8(3)]
    place = Place(two, np.int64(3), {"tp": axis})
    assert place == Place(2, 3, {"tp": (2, 3)})
    record = a_record(
        rank=two, world_size=np.int64(3), version=two, topology={"tp": [two, np.int8(3)]}
    )
    assert (record.key, record.version, record.topology) == ("/engines/qwen/2", 2, {"tp": (2, 3)})
    assert decode(record.key, encode(record)) == record


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number_is_refused_by_the_name_of_its_field(value: Any) -> None:
    for field in ("rank", "world_size", "version"):
        with pytest.raises(
            InvalidField, match=f"^{field} .* is not valid: it is a whole number"
        ) as caught:
            a_record(**{field: value})
        assert caught.value.details["field"] == field
    for topology in ({"tp": (value, 2)}, {"tp": (0, value)}):
        with pytest.raises(InvalidField, match=r"^topology 'tp': "):
            a_record(topology=topology)
        with pytest.raises(InvalidField, match=r"^topology 'tp': "):
            Place(0, 1, topology)
    with pytest.raises(InvalidField, match=r"^rank "):
        Place(value)
    for field in ("global_shape", "offsets"):
        given: dict[str, Any] = {"global_shape": (1,), "offsets": (0,), field: (value,)}
        with pytest.raises(TensorsUnusable, match=f"^{field} .* of a shard is not valid"):
            Shard(**given)


@pytest.mark.parametrize("value", [3, None, {1, 2}, {1: 2}, "1,2"])
def test_what_has_no_order_is_no_shape(value: Any) -> None:
    with pytest.raises(
        TensorsUnusable,
        match=r"^global_shape .* of a shard is not valid: it has a whole number for each",
    ):
        Shard(value, (0, 0))
    with pytest.raises(InvalidField, match=r"^topology 'tp': "):
        Place(0, 1, {"tp": value})


@pytest.mark.parametrize(
    "value", [5, 5.0, np.float32(5), np.int64(5), Fraction(5), torch.tensor(5.0)], ids=repr
)
def test_what_stands_for_a_time_is_one(value: Any) -> None:
    assert seconds("timeout_s", value) == 5.0


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry(EtcdConfig(parse_endpoints("fake:1"))) as registry:
        yield registry


@pytest.fixture
def calls(registry: Registry) -> dict[str, Any]:
    """The public functions, with arguments that are good but for what a test adds."""
    engine = InProcessEngine()
    tensors = {"w": torch.zeros(3)}
    rank = {"rank": 0, "world_size": 1, "instance": "a"}

    def seed(**options: Any) -> Any:
        return load_or_seed(
            registry,
            engine,
            MODEL,
            tensors,
            **for_start({**rank, "fallback": "nowhere", **options}),
        )

    return {
        "load": lambda **options: load(
            registry, engine, "a", **for_load({"rank": 0, "tensors": tensors, **options})
        ),
        "publish": lambda **options: publish(
            registry, engine, **for_publish({**rank, "tensors": tensors, "model": MODEL, **options})
        ),
        "load_or_seed": seed,
        "load_module": lambda **options: load_module(
            registry, engine, "a", torch.nn.Linear(2, 2), **options
        ),
        "load_instance": lambda **options: load_instance(
            registry, engine, "a", tensors={0: tensors}, **options
        ),
        "load_full": lambda **options: load_full(registry, engine, "a", **options),
        "read_catalogue": lambda **options: read_catalogue(registry, engine, "a", **options),
    }


TIMES = {
    "load": "timeout_s",
    "publish": "ttl_s",
    "load_or_seed": "timeout_s",
    "load_module": "timeout_s",
    "load_instance": "timeout_s",
    "load_full": "timeout_s",
    "read_catalogue": "timeout_s",
}


@pytest.mark.parametrize("value", NO_TIME, ids=repr)
@pytest.mark.parametrize(("call", "field"), TIMES.items(), ids=TIMES)
def test_what_is_no_time_is_refused_at_once(
    calls: dict[str, Any], call: str, field: str, value: Any
) -> None:
    with pytest.raises(
        InvalidField, match=f"^{field} .* is not valid: it is a number of seconds from [02] to "
    ):
        calls[call](**{field: value})


NUMBERS = [
    ("load", "rank"),
    ("load", "version"),
    ("load", "world_size"),
    ("load", "max_sources"),
    ("load_module", "rank"),
    ("publish", "rank"),
    ("publish", "world_size"),
    ("publish", "version"),
    ("load_or_seed", "rank"),
    ("load_or_seed", "world_size"),
    ("load_or_seed", "version"),
    ("load_or_seed", "max_sources"),
    ("read_catalogue", "max_group_nbytes"),
]


@pytest.mark.parametrize("value", [True, 2.0, "2", -1], ids=repr)
@pytest.mark.parametrize(("call", "field"), NUMBERS)
def test_what_is_no_such_number_is_refused_at_once(
    calls: dict[str, Any], call: str, field: str, value: Any
) -> None:
    with pytest.raises(InvalidField, match=f"^{field} .* is not valid: it is a whole number"):
        calls[call](**{field: value})


@pytest.mark.parametrize("call", ["load", "publish", "load_or_seed"])
def test_a_topology_of_other_things_is_refused_at_once(calls: dict[str, Any], call: str) -> None:
    with pytest.raises(InvalidField, match=r"^topology 'tp': "):
        calls[call](topology={"tp": (0.0, 2)})
