"""What the benchmark of scale makes of its counts: exponents, and verdicts about goals."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scale.counts import exponent
from benchmarks.scale.figures import text_of
from benchmarks.scale.goals import GOALS, verdicts


@given(st.floats(0.5, 3), st.floats(0.1, 100))
def test_the_exponent_of_a_power_is_found(power: float, factor: float) -> None:
    sizes = [8, 64, 1_024]
    assert exponent(sizes, [factor * size**power for size in sizes]) == pytest.approx(power)


@pytest.mark.parametrize(
    ("sizes", "values"), [([], []), ([8], [1.0]), ([8, 16], [0.0, 3.0]), ([8, 8], [1.0, 2.0])]
)
def test_less_than_two_points_have_no_exponent(sizes: list[float], values: list[float]) -> None:
    assert math.isnan(exponent(sizes, values))


def test_a_goal_is_met_by_what_it_says_at_most() -> None:
    goal = GOALS[0]
    for value, said in ((goal.most, "met"), (goal.most + 1, "not met"), (math.nan, "not met")):
        assert verdicts({goal.figure: value})[0].said == said
    assert verdicts({})[0].said == "not measured"


@pytest.mark.parametrize(
    ("cell", "text"),
    [("a", "a"), (12_345, "12,345"), (0.12345, "0.123"), (1234.5, "1,234"), (9.876, "9.88")],
)
def test_cells_have_three_digits(cell: str | int | float, text: str) -> None:
    assert text_of(cell) == text
