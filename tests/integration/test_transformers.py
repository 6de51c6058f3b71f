"""Models as transformers has them, built without memory and filled from a rank that serves one.

The classes here stand for those of transformers, which is not installed for these tests. Those of
`tests/engines` run the real ones.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine_loader import InProcessEngine, LoadOptions, PublishOptions
from engine_loader.errors import WeightsMismatch
from engine_loader.integrations.transformers import identity_of, load, publish_model
from engine_registry import ModelIdentity, Registry
from tests.unit.loader.tensors.test_meta import Tied


class Config(SimpleNamespace):
    name_or_path = "tiny"
    _commit_hash = None

    def to_dict(self) -> dict[str, Any]:
        return {"hidden_size": 4, "_name_or_path": self.name_or_path, **vars(self)}


class Model(Tied):
    """As a class of transformers: `_from_config` makes one."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @classmethod
    def _from_config(cls, config: Any, dtype: torch.dtype | None = None) -> Model:
        model = cls(config)
        return model if dtype is None else model.to(dtype)


class Auto:
    """As `AutoModelForCausalLM`."""

    @staticmethod
    def from_config(config: Any) -> Model:
        return Model(config)


@pytest.mark.parametrize("model_class", [Model, Auto])
def test_a_model_is_built_and_filled_from_one_that_is_published(
    registry: Registry, model_class: Any
) -> None:
    model = Model(Config())
    with publish_model(
        model,
        registry=registry,
        engine=InProcessEngine(),
        instance="a",
        options=PublishOptions(digests=True),
    ):
        found = load(
            model_class,
            model.config,
            "a",
            registry=registry,
            engine=InProcessEngine(),
            options=LoadOptions(verify="digest"),
        )
    assert not found.training
    assert found.head.weight is found.embed.weight
    tensors = dict(found.named_parameters()) | dict(found.named_buffers())
    wanted = dict(model.named_parameters()) | dict(model.named_buffers())
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name], tensor), name


def test_another_dtype_is_refused_with_the_tensors_that_differ(registry: Registry) -> None:
    model = Model(Config())
    with (
        publish_model(model, registry=registry, engine=InProcessEngine(), instance="a"),
        pytest.raises(WeightsMismatch, match="bfloat16"),
    ):
        load(
            Model,
            model.config,
            "a",
            registry=registry,
            engine=InProcessEngine(),
            dtype=torch.bfloat16,
        )


def test_the_identity_of_a_model_follows_from_its_configuration() -> None:
    def of(**changes: Any) -> ModelIdentity:
        return identity_of(Model(Config(**changes)))

    plain = of()
    assert (plain.name, plain.revision, plain.dtype, plain.quantization) == (
        "tiny",
        "",
        "float32",
        "",
    )
    assert of(name_or_path="/models/tiny", _commit_hash="abc").name == "/models/tiny"
    assert of(_commit_hash="abc").revision == "abc"
    assert of(num_layers=3) != plain
    quantized = of(quantization_config={"quant_method": "fp8"})
    assert quantized.quantization == "fp8"
    assert quantized != of(quantization_config={"quant_method": "fp8", "block": 128})


def test_a_model_of_another_name_and_rank_is_published_as_such(registry: Registry) -> None:
    identity = ModelIdentity("policy", "step-7")
    with publish_model(
        nn.Linear(2, 2),
        registry=registry,
        engine=InProcessEngine(),
        instance="a",
        identity=identity,
        rank=1,
        world_size=2,
    ) as publication:
        record = publication.record
    assert (record.model, record.rank, record.world_size) == (identity, 1, 2)
