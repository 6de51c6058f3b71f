"""Whole tensors in groups by layer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.planning.layers import by_layer, in_order, layer_of
from engine_loader.planning.whole import Whole

NAMES = st.lists(
    st.lists(st.sampled_from(["model", "layers", "0", "2", "10", "007", "9" * 5000, "w", "²", ""]))
    .map(".".join)
    .filter(bool),
    unique=True,
)


def a_whole(name: str, nbytes: int = 4) -> Whole:
    return Whole(name, "uint8", (nbytes,), nbytes, opaque=False)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up.weight", "model.layers.3"),
        ("model.layers.12.mlp.experts.7.up.weight", "model.layers.12"),
        ("visual.blocks.3.norm", "visual.blocks.3"),
        ("0.weight", "0"),
        ("lm_head.weight", ""),
        ("conv1.weight", ""),
    ],
)
def test_a_layer_is_the_name_up_to_its_first_number(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_numbers_in_names_are_in_the_order_of_their_values() -> None:
    names = ["layers.10.w", "layers.2.w", "layers.w", "head", "layers.2.b", "layers.02.b"]
    assert in_order(names) == [
        "head",
        "layers.02.b",
        "layers.2.b",
        "layers.2.w",
        "layers.10.w",
        "layers.w",
    ]


def test_a_layer_is_a_group_and_what_is_of_no_layer_comes_first() -> None:
    names = ["norm", "layers.10.w", "layers.2.w", "visual.2.w", "layers.10.b", "embed"]
    groups = by_layer([a_whole(name) for name in names], 100)
    assert [[whole.name for whole in group] for group in groups] == [
        ["embed", "norm"],
        ["layers.2.w"],
        ["layers.10.b", "layers.10.w"],
        ["visual.2.w"],
    ]


@given(NAMES, st.lists(st.integers(0, 20), min_size=30, max_size=30), st.integers(1, 25))
def test_every_tensor_is_in_one_group_of_its_layer_and_no_group_of_several_is_too_large(
    names: list[str], sizes: list[int], max_nbytes: int
) -> None:
    wholes = [a_whole(name, size) for name, size in zip(names, sizes, strict=False)]
    groups = by_layer(wholes, max_nbytes)
    assert sorted(whole.name for group in groups for whole in group) == sorted(
        whole.name for whole in wholes
    )
    for group in groups:
        assert len({layer_of(whole.name) for whole in group}) == 1
        assert len(group) == 1 or sum(whole.nbytes for whole in group) <= max_nbytes
    assert by_layer(wholes[::-1], max_nbytes) == groups
