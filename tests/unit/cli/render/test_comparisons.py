"""Comparisons as people read them: a line a difference, and why something is not proven."""

from __future__ import annotations

from typing import Any

from engine_cli.render.comparisons import difference_line, difference_row, summary
from engine_cli.render.documents import comparison_json
from engine_loader import Aspect, Comparison, Difference, Obstacle

NAME = Difference("bias", Aspect.NAME, {"a": "float32 8", "b": ""})
SHAPE = Difference("head", Aspect.SHAPE, {"a": "8x4", "b": "8x2"})
BYTES = Difference(
    "norm", Aspect.BYTES, {"a/0": "61616161", "a/1": "61616161", "b/0": "62626262", "b/1": "63"}
)


def a_comparison(**changes: Any) -> Comparison:
    return Comparison(
        **{
            "sides": ("a", "b"),
            "tensors": 9,
            "compared": 9,
            "differences": (),
            "unproven": {},
            "without_digests": (),
            **changes,
        }
    )


def test_a_line_says_what_each_side_has() -> None:
    assert difference_line(NAME) == "bias: in a, not in b"
    assert difference_line(SHAPE) == "head: shape 8x4 in a; 8x2 in b"
    assert difference_line(BYTES) == (
        "norm: bytes 61616161 in a/0, a/1; 62626262 in b/0; 63 in b/1"
    )


def test_a_row_has_a_cell_for_each_side_and_names_ranks_only_where_they_differ() -> None:
    assert difference_row(NAME, ("a", "b")) == ["name", "bias", "float32 8", "-"]
    assert difference_row(SHAPE, ("a", "b")) == ["shape", "head", "8x4", "8x2"]
    assert difference_row(BYTES, ("a", "b")) == [
        "bytes",
        "norm",
        "61616161",
        "62626262 (rank 0), 63 (rank 1)",
    ]


def test_the_summary_says_what_came_of_it() -> None:
    assert list(summary(a_comparison())) == ["the same: 9 tensors in a and b"]
    assert list(summary(a_comparison(differences=(NAME, SHAPE)))) == [
        "different: 2 of 9 tensors in a and b"
    ]
    assert list(summary(a_comparison(sides=("a",), compared=1))) == [
        "the same on each rank that has them: 1 of 9 tensors in a"
    ]


def test_the_summary_says_why_bytes_were_not_compared_and_what_to_do() -> None:
    silent = a_comparison(unproven={"w": Obstacle.NO_DIGESTS}, without_digests=("b/0",))
    assert list(summary(silent)) == [
        "not compared: the bytes of 1 tensor, as ranks publish no digests",
        "no digests: b/0",
        "to mend it, publish with digests, as `engines register` does",
        "not proven to be the same: 1 of 9 tensors in a and b",
    ]
    for obstacle in Obstacle:
        lines = list(summary(a_comparison(unproven={"w": obstacle}, without_digests=("b/0",))))
        assert any(line.startswith("to mend it, ") for line in lines)
        assert max(map(len, lines)) <= 80


def test_the_object_of_a_comparison_keeps_its_fields() -> None:
    found = a_comparison(
        differences=(NAME,), unproven={"w": Obstacle.LAYOUT}, without_digests=("b/0",)
    )
    assert comparison_json(found) == {
        "sides": ["a", "b"],
        "same": False,
        "tensors": 9,
        "compared": 9,
        "differences": [
            {"tensor": "bias", "aspect": "name", "values": {"a": "float32 8", "b": None}}
        ],
        "unproven": [{"tensor": "w", "obstacle": "layout"}],
        "without_digests": ["b/0"],
    }
