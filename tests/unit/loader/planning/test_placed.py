"""Where the boxes of a fused tensor lie in its memory, beside going from element to element."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.planning.boxes import Box
from engine_loader.planning.placed import (
    Placed,
    boxes_of,
    in_one_order,
    lines,
    placed,
    steps_of,
    strides_like,
)
from engine_registry import TensorEntry
from tests.support.builders import an_entry
from tests.support.meshes import Whole, fused


@st.composite
def held(draw: st.DrawFn) -> TensorEntry:
    """By one of the ranks that have a whole between them, in any order of its dimensions."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    ranks = draw(st.integers(1, 3))
    order = draw(st.none() | st.permutations(range(len(shape))).map(tuple))
    along = draw(st.sampled_from(draw(fused(shape, ranks))))
    return Whole("w", shape, 1, b"", order).entry(along, 1000)


def elements(box: Box) -> list[tuple[int, ...]]:
    sides = zip(box.offsets, box.shape, strict=True)
    return list(itertools.product(*(range(start, start + size) for start, size in sides)))


@given(held())
def test_each_element_of_each_box_lies_where_the_tensor_has_it(entry: TensorEntry) -> None:
    indices = [[at for some in slices for at in range(*some)] for slices in entry.along]
    expected = [
        (tuple(side[at] for side, at in zip(indices, place, strict=True)), place)
        for place in itertools.product(*map(range, entry.shape))
    ]
    found = []
    for some, ahead in placed(entry):
        for index in elements(some.box):
            from_box = zip(index, some.box.offsets, some.steps, strict=True)
            found.append((index, ahead + sum((at - low) * step for at, low, step in from_box)))
    steps = steps_of(entry)
    assert sorted(found) == sorted(
        (index, sum(at * step for at, step in zip(place, steps, strict=True)))
        for index, place in expected
    )
    assert [some.box for some, _ in placed(entry)] == boxes_of(entry)
    assert len(boxes_of(entry)) == entry.boxes or not entry.nbytes


@pytest.mark.parametrize(
    ("strides", "shape", "found"),
    [
        (None, (3, 5), None),
        ((1, 4), (3, 5), (1, 3)),
        ((1, 4), (3, 0), None),
        ((1, 4), (1, 5), None),
        ((1, 4), (3, 1), None),
    ],
)
def test_strides_of_another_shape_are_in_the_same_order(
    strides: tuple[int, ...] | None, shape: tuple[int, ...], found: tuple[int, ...] | None
) -> None:
    assert strides_like(an_entry(shape=(4, 6), nbytes=24, strides=strides), shape) == found


@pytest.mark.parametrize(
    ("shape", "strides", "other", "other_strides", "same"),
    [
        ((4, 6), None, (2, 6), None, True),
        ((4, 6), (1, 4), (4, 3), (1, 4), True),
        ((4, 6), (1, 4), (4, 6), None, False),
        ((4, 6), (1, 4), (4, 1), None, True),
        ((4, 6), (1, 4), (0, 6), None, True),
        ((2, 3, 4), (12, 1, 3), (5, 3, 4), (1, 5, 15), False),
        ((2, 3, 4), (12, 1, 3), (1, 3, 4), (1, 1, 3), True),
    ],
)
def test_only_dimensions_along_which_both_have_several_elements_have_an_order(
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    other: tuple[int, ...],
    other_strides: tuple[int, ...] | None,
    same: bool,
) -> None:
    one, two = (
        an_entry(shape=some, nbytes=0 if 0 in some else 1, strides=steps)
        for some, steps in ((shape, strides), (other, other_strides))
    )
    assert in_one_order(one, two) == in_one_order(two, one) == same


def test_bytes_in_another_order_of_dimensions_are_no_lines() -> None:
    box = Box((0, 0), (4, 6))
    with pytest.raises(ValueError, match="another order at the source"):
        lines(box, Placed(box, (1, 4)), Placed(box, (6, 1)), 4)
