"""Which tensors a model of vLLM gets from a mirror."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import vllm_reload
from tests.support.vllm_reload import Linear, Weights


@pytest.fixture
def handing(monkeypatch: pytest.MonkeyPatch) -> Any:
    vllm_reload.install(monkeypatch)
    return importlib.import_module("engine_loader.integrations.vllm.handing")


class Model(nn.Module):
    """`places` says which module takes a tensor, and as which part. With `says` it returns what it
    has loaded, as most models do.
    """

    def __init__(self, places: dict[str, tuple[str, int]], *, says: bool = True) -> None:
        super().__init__()
        self.places, self.says = places, says
        self.fused = Linear(2)
        self.layers = nn.ModuleList([nn.ModuleDict({"a": Linear(1)}) for _ in range(2)])
        self.handed: list[str] = []

    def load_weights(self, weights: Weights) -> set[str] | None:
        loaded = set()
        for name, tensor in weights:
            module, part = self.places[name]
            self.handed.append(name)
            self.get_submodule(module).load(part, tensor)  # type: ignore[operator]
            loaded.add(f"{module}.weight")
        return loaded if self.says else None


def mirror_of(groups: Iterable[tuple[str, ...]], values: dict[str, int]) -> Any:
    return SimpleNamespace(
        groups=list(groups),
        tensors={
            name: torch.full((vllm_reload.WIDTH,) * 2, float(value))
            for name, value in values.items()
        },
        digests={name: bytes([value]) for name, value in values.items()},
    )


def hand_twice(
    handing: Any, model: Model, groups: list[tuple[str, ...]], changed: str
) -> list[str]:
    """What is handed the second time, after that tensor has changed."""
    values = {name: 1 for group in groups for name in group}
    one = handing.Handing()
    for change in ({}, {changed: 2}):
        values |= change
        model.handed.clear()
        one.hand(model, mirror_of(groups, values), True)
        vllm_reload.finalize_layerwise_reload(model, None)
    assert one.changed == len(model.handed)
    for name, (module, part) in model.places.items():
        held = model.get_submodule(module).raw()[part]  # type: ignore[operator]
        assert (held == values[name]).all(), name
    return model.handed


PLACES = {
    "x.0.q": ("fused", 0),
    "x.1.k": ("fused", 1),
    "layers.0.a": ("layers.0.a", 0),
    "layers.1.a": ("layers.1.a", 0),
}
GROUPS: list[tuple[str, ...]] = [("x.0.q",), ("x.1.k",), ("layers.0.a",), ("layers.1.a",)]


@pytest.mark.parametrize("says", [True, False])
def test_layers_that_fill_one_module_are_handed_together(handing: Any, says: bool) -> None:
    assert hand_twice(handing, Model(PLACES, says=says), GROUPS, "x.1.k") == ["x.0.q", "x.1.k"]
    assert hand_twice(handing, Model(PLACES, says=says), GROUPS, "layers.1.a") == ["layers.1.a"]


def test_all_are_handed_where_a_tensor_goes_to_no_module_that_could_be_reloaded_alone(
    handing: Any,
) -> None:
    model = Model(PLACES)
    load_weights = model.load_weights

    def load(weights: Weights) -> set[str]:
        return (load_weights(weights) or set()) | {"scale"}  # a parameter of the model itself

    model.load_weights = load  # type: ignore[method-assign]
    assert hand_twice(handing, model, GROUPS, "layers.1.a") == [name for (name,) in GROUPS]


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("layers.1", "layers.1", True),
        ("layers.1", "layers.10", False),
        ("layers", "layers.10", True),
        ("head.a", "head", True),
        ("head", "embed", False),
    ],
)
def test_modules_overlap_if_one_is_in_the_other(
    handing: Any, one: str, other: str, overlap: bool
) -> None:
    assert handing._overlap(one, other) is overlap
