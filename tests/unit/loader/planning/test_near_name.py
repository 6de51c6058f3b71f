"""Names of tensors that are like one that a source lacks."""

from __future__ import annotations

import pytest

from engine_loader.planning.near_name import near_name

KNOWN = ["embed.weight", "model.layers.0.mlp.weight", "layers.1.mlp.weight"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("layers.0.mlp.weight", "model.layers.0.mlp.weight"),
        ("model.layers.1.mlp.weight", "layers.1.mlp.weight"),
        ("embed.wieght", "embed.weight"),
        ("0.mlp.weight", "model.layers.0.mlp.weight"),
        ("norm.weight", ""),
        ("lm_head", ""),
        ("layers.2.mlp.weight", ""),
    ],
    ids=[
        "a prefix there",
        "a prefix here",
        "a slip",
        "two parts",
        "a part of a word",
        "another",
        "another layer",
    ],
)
def test_a_name_is_near_if_only_what_stands_before_it_or_a_letter_differs(
    name: str, near: str
) -> None:
    assert near_name(name, KNOWN) == near


def test_very_many_names_are_compared_by_their_parts_only() -> None:
    many = [f"layers.{number}.weight" for number in range(20_000)]
    assert near_name("layers.7.wieght", many) == ""
    assert near_name("model.layers.7.weight", many) == "layers.7.weight"
