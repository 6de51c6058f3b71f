"""Boxes and lines, each beside what going from element to element gives."""

from __future__ import annotations

import itertools
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.planning.boxes import Box, Lines, Nearby, check_partition
from engine_loader.planning.placed import lines
from tests.support.meshes import in_rows, lines_one_by_one

Index = tuple[int, ...]


def elements(box: Box) -> set[Index]:
    return set(
        itertools.product(
            *(
                range(start, start + size)
                for start, size in zip(box.offsets, box.shape, strict=True)
            )
        )
    )


@st.composite
def boxes(draw: st.DrawFn, dimensions: int, least: int = 0) -> Box:
    offsets, shape = (
        draw(st.tuples(*[st.integers(low, 4) for _ in range(dimensions)])) for low in (0, least)
    )
    return Box(offsets, shape)


pairs = st.integers(0, 4).flatmap(
    lambda dimensions: st.tuples(boxes(dimensions), boxes(dimensions))
)


@given(pairs)
def test_two_boxes_meet_in_the_elements_that_both_hold(pair: tuple[Box, Box]) -> None:
    one, other = pair
    common = one.meet(other)
    assert (elements(common) if common is not None else set()) == elements(one) & elements(other)
    assert one.meet(other) == other.meet(one)


@given(pairs)
def test_what_is_left_of_a_box_is_in_boxes_that_do_not_overlap(pair: tuple[Box, Box]) -> None:
    one, other = pair
    rest = one.minus(other)
    assert all(part.volume for part in rest)
    assert sum(part.volume for part in rest) == len(elements(one) - elements(other))
    assert set().union(*map(elements, rest)) == elements(one) - elements(other)


@given(pairs)
def test_a_box_holds_another_that_is_not_empty_if_it_holds_its_elements(
    pair: tuple[Box, Box],
) -> None:
    one, other = pair
    assert one.holds(other) == bool(elements(other) and elements(other) <= elements(one))


def is_partition(whole: Box, parts: list[Box]) -> bool:
    held = [index for part in parts for index in elements(part)]
    return all(map(elements, parts)) and sorted(held) == sorted(elements(whole))


@st.composite
def cuttings(draw: st.DrawFn) -> tuple[Box, list[Box]]:
    """A box in parts, as cuts now here and now there leave them."""
    whole = draw(st.integers(0, 3).flatmap(lambda dimensions: boxes(dimensions, least=1)))
    parts = [whole]
    for _ in range(draw(st.integers(0, 6))):
        some = parts.pop(draw(st.integers(0, len(parts) - 1)))
        half = draw(boxes(len(whole.shape)))
        parts += [*some.minus(half), *([common] if (common := some.meet(half)) is not None else [])]
    return whole, draw(st.permutations(parts))


@given(cuttings(), st.data())
def test_a_partition_is_distinguished_from_what_is_none(
    cutting: tuple[Box, list[Box]], data: st.DataObject
) -> None:
    whole, parts = cutting
    check_partition(whole, parts)
    place = data.draw(st.integers(0, len(parts) - 1))
    other = data.draw(boxes(len(whole.shape)))
    for wrong in (
        [*parts[:place], *parts[place + 1 :]],
        [*parts, parts[place]],
        [*parts[:place], other, *parts[place + 1 :]],
    ):
        if not is_partition(whole, wrong):
            with pytest.raises(
                ValueError, match=r"a part lies outside|two parts hold|do not hold all"
            ):
                check_partition(whole, wrong)


@pytest.mark.parametrize("axis", [0, 1])
def test_two_of_very_many_parts_that_overlap_are_found(axis: int) -> None:
    whole = Box((0, 0), (4_000, 4_000))
    parts = [
        Box((0, 4 * at) if axis else (4 * at, 0), (4_000, 4) if axis else (4, 4_000))
        for at in range(1_000)
    ]
    check_partition(whole, parts)
    parts[500] = Box(parts[0].offsets, parts[500].shape)
    with pytest.raises(ValueError, match="two parts hold the same element"):
        check_partition(whole, parts)


@given(
    st.integers(0, 3).flatmap(
        lambda dimensions: st.tuples(
            st.lists(boxes(dimensions, least=1), max_size=6), boxes(dimensions, least=1)
        )
    )
)
def test_all_boxes_that_meet_one_are_near_it(some: tuple[list[Box], Box]) -> None:
    others, box = some
    nearby: Nearby[int] = Nearby(others)
    for number, other in enumerate(others):
        nearby.add(other, number)
    found = {number for _, number in nearby.of(box)}
    assert {number for number, other in enumerate(others) if other.meet(box)} <= found
    assert all(others[number] == other for other, number in nearby.of(box))


# -- lines
# --------------------------------------------------------------------------------------------------


def address(index: Index, box: Box, itemsize: int) -> int:
    at = 0
    for place, start, size in zip(index, box.offsets, box.shape, strict=True):
        at = at * size + place - start
    return at * itemsize


@given(pairs.filter(lambda pair: pair[0].meet(pair[1]) is not None), st.sampled_from([1, 2, 4]))
def test_lines_take_each_element_that_both_hold_from_its_place_to_its_place(
    pair: tuple[Box, Box], itemsize: int
) -> None:
    src, dst = pair
    part = src.meet(dst)
    assert part is not None
    some = lines(part, in_rows(src), in_rows(dst), itemsize)
    moved = {
        (at + ahead, to + ahead)
        for at, to in lines_one_by_one(some)
        for ahead in range(some.nbytes)
    }
    assert moved == {
        (address(index, src, itemsize) + byte, address(index, dst, itemsize) + byte)
        for index in elements(part)
        for byte in range(itemsize)
    }
    assert some.payload == part.volume * itemsize == len(moved)
    assert some.extent == 1 + max(at for at, _ in moved) - min(at for at, _ in moved)


@pytest.mark.parametrize(
    ("part", "src", "dst", "counts"),
    [
        pytest.param((4, 6), (4, 6), (9, 6), (), id="whole rows are one run"),
        pytest.param((1, 3), (4, 6), (4, 3), (), id="a part of one row is one run"),
        pytest.param((4, 3), (4, 6), (4, 3), (4,), id="parts of rows are a run each"),
        pytest.param(
            (2, 4, 3), (2, 4, 6), (2, 4, 3), (8,), id="axes with one distance throughout are one"
        ),
        pytest.param(
            (2, 4, 3),
            (2, 5, 6),
            (2, 4, 3),
            (2, 4),
            id="axes with rows left out between them stay two",
        ),
        pytest.param(
            (1, 4, 1, 3), (3, 4, 5, 3), (1, 4, 1, 3), (4,), id="axes of one element are none"
        ),
    ],
)
def test_runs_and_axes_are_as_few_as_can_be(
    part: Index, src: Index, dst: Index, counts: Index
) -> None:
    held, there, here = (Box((0,) * len(shape), shape) for shape in (part, src, dst))
    assert lines(held, in_rows(there), in_rows(here), 4).counts == counts


@st.composite
def any_lines(draw: st.DrawFn) -> Lines:
    counts = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    steps: list[tuple[int, ...]] = []
    nbytes = draw(st.integers(1, 4))
    for _ in range(2):
        step, own = nbytes, []
        for count in reversed(counts):
            step += draw(st.integers(0, 3))
            own.append(step)
            step *= count
        steps.append(tuple(reversed(own)))
    return Lines(draw(st.integers(0, 9)), draw(st.integers(0, 9)), nbytes, counts, *steps)


@given(any_lines(), st.data())
def test_lines_along_some_axes_are_the_same_runs_in_the_same_order(
    some: Lines, data: st.DataObject
) -> None:
    axes = data.draw(st.integers(0, len(some.counts)))
    each = list(some.along(axes))
    assert len(each) == prod(some.counts[:axes])
    assert all(one.counts == some.counts[axes:] for one in each)
    assert [run for one in each for run in lines_one_by_one(one)] == lines_one_by_one(some)


@given(any_lines(), st.integers(1, 6))
def test_lines_are_split_into_parts_with_the_same_runs_in_the_same_order(
    some: Lines, at_once: int
) -> None:
    parts = list(some.split(at_once))
    assert [run for part in parts for run in lines_one_by_one(part)] == lines_one_by_one(some)
    assert len(parts) == (-(-some.counts[0] // at_once) if some.counts else 1)
    if len(parts) > 1:
        assert all(prod(part.counts) <= at_once * prod(some.counts[1:]) for part in parts)
        assert all(part.counts == some.counts[1:] or part.counts[0] > 1 for part in parts)


@given(any_lines())
def test_lines_further_on_are_the_same_runs_there(some: Lines) -> None:
    assert lines_one_by_one(some.at(5, 7)) == [
        (src + 5, dst + 7) for src, dst in lines_one_by_one(some)
    ]
