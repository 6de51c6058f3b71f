"""From whom each part of a tensor comes, why it cannot be had where it cannot, and who need not be
asked.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.planning.boxes import Box, Lines
from engine_loader.planning.matching import Offers, Origin, needed
from engine_loader.planning.plan import differences
from engine_loader.planning.reads import Span
from engine_registry import Manifest, TensorEntry
from tests.support.builders import a_manifest, an_entry
from tests.support.meshes import Resharding, origins_of, reshardings


def a_box(
    offsets: tuple[int, ...],
    shape: tuple[int, ...],
    whole: tuple[int, ...],
    addr: int = 1000,
    **changes: Any,
) -> TensorEntry:
    """A box of the tensor w that has the shape `whole`."""
    box = {
        "nbytes": Box(offsets, shape).volume,
        "shape": shape,
        "offsets": offsets,
        "global_shape": whole,
        "opaque": False,
    }
    return an_entry("w", addr, **{**box, **changes})


def offered(*entries: TensorEntry, own: int | None = None) -> list[Origin]:
    """Each by a separate rank."""
    return [
        Origin(f"a/{number}", a_manifest(entry), number == own)
        for number, entry in enumerate(entries)
    ]


def parts(origins: list[Origin], wanted: TensorEntry) -> list[Span]:
    found, problem = Offers(origins).parts_of(wanted)
    assert problem == ""
    return found


def problem(origins: list[Origin], wanted: TensorEntry) -> str:
    found, message = Offers(origins).parts_of(wanted)
    assert found == []
    return message


# -- whom from
# --------------------------------------------------------------------------------------------------


def test_ranks_that_hold_the_same_are_read_from_and_no_others() -> None:
    whole, half = a_box((0,), (8,), (8,)), a_box((0,), (4,), (8,))
    assert parts(offered(half, whole, whole), a_box((0,), (8,), (8,), addr=5000)) == [
        Span(5000, 8, ((1, 1000), (2, 1000)))
    ]


def test_all_that_hold_a_part_are_its_sources() -> None:
    low, high = a_box((0,), (4,), (8,), 1000), a_box((4,), (4,), (8,), 2000)
    assert parts(offered(high, low, high), a_box((2,), (5,), (8,), addr=5000)) == [
        Span(5002, 3, ((0, 2000), (2, 2000))),
        Span(5000, 2, ((1, 1002),)),
    ]


def test_as_much_as_possible_comes_from_one() -> None:
    quarters = [a_box((at,), (2,), (8,)) for at in (0, 2, 4, 6)]
    assert parts(
        offered(*quarters, a_box((1,), (7,), (8,))), a_box((0,), (8,), (8,), addr=5000)
    ) == [
        Span(5001, 7, ((4, 1000),)),
        Span(5000, 1, ((0, 1000),)),
    ]


def test_a_part_in_many_runs_is_one_span_with_lines() -> None:
    columns = a_box((0, 2), (4, 3), (4, 6))
    assert parts(offered(columns), a_box((1, 3), (2, 2), (4, 6), addr=5000)) == [
        Span(0, 5, ((0, 1004),), (Lines(0, 5000, 2, (2,), (3,), (2,)),))
    ]


def test_a_tensor_without_a_box_comes_from_its_own_rank_only() -> None:
    entries = [an_entry("w", 1000), an_entry("w", 2000)]
    assert parts(offered(*entries, own=1), an_entry("w", 5000)) == [Span(5000, 16, ((1, 2000),))]
    assert "only other ranks have it, and it does not say what it is part of" in problem(
        offered(*entries), an_entry("w", 5000)
    )


def test_a_tensor_without_elements_needs_nobody() -> None:
    assert parts(offered(a_box((0,), (8,), (8,))), a_box((8,), (0,), (8,), addr=0)) == []


def test_a_fused_tensor_is_filled_box_by_box_from_all_that_hold_them() -> None:
    def rows(*slices: tuple[int, int], addr: int) -> TensorEntry:
        """Of two bytes each."""
        count = sum(stop - start for start, stop in slices)
        fused = (tuple(slices), ((0, 2),)) if len(slices) > 1 else None
        return a_box((slices[0][0], 0), (count, 2), (8, 2), addr, slices=fused)

    first, second = rows((0, 2), (4, 5), (6, 8), addr=1000), rows((2, 4), (5, 8), addr=2000)
    # The rows 6 and 7 are on both ranks.
    assert parts(offered(first, second), rows((0, 8), addr=5000)) == [
        Span(5010, 6, ((1, 2004),)),
        Span(5000, 4, ((0, 1000),)),
        Span(5004, 4, ((1, 2000),)),
        Span(5008, 2, ((0, 1004),)),
    ]
    assert parts(offered(first, second), rows((6, 8), (1, 3), addr=5000)) == [
        Span(5000, 4, ((0, 1006), (1, 2006))),
        Span(5004, 2, ((0, 1002),)),
        Span(5006, 2, ((1, 2000),)),
    ]
    assert parts(offered(first, second, first), rows((0, 2), (4, 5), (6, 8), addr=5000)) == [
        Span(5000, 10, ((0, 1000), (2, 1000)))
    ]


# -- why not
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offers", "wanted", "message"),
    [
        pytest.param(
            [a_box((0,), (4,), (8,)), a_box((6,), (2,), (8,))],
            a_box((2,), (6,), (8,)),
            "no rank of the source holds the box at [4] of shape 2",
            id="a part that nobody holds",
        ),
        pytest.param(
            [a_box((0,), (4,), (8,)), a_box((4,), (4,), (8,), dtype="int8")],
            a_box((0,), (8,), (8,)),
            "dtype int8 in the source, uint8 here",
            id="one of another dtype",
        ),
        pytest.param(
            [a_box((0,), (4,), (8,)), a_box((4,), (4,), (9,)), a_box((4, 0), (4, 1), (8, 1))],
            a_box((0,), (8,), (8,)),
            "part of 8x1, 9 in the source, of 8 here",
            id="parts of something else",
        ),
        pytest.param(
            [a_box((0,), (4,), (8,)), a_box((4,), (4,), (8,), nbytes=8)],
            a_box((0,), (8,), (8,)),
            "4 bytes in the source, 8 here, though the dtype is the same",
            id="elements of another size",
        ),
        pytest.param(
            [an_entry("w", nbytes=4), an_entry("w", nbytes=4)],
            a_box((0,), (8,), (8,)),
            "no statement of what it is part of in the source, box at [0] of 8 here: say "
            "`shards` on both sides, or on neither",
            id="no statement in the source",
        ),
    ],
)
def test_what_is_in_the_way_is_reported(
    offers: list[TensorEntry], wanted: TensorEntry, message: str
) -> None:
    assert problem(offered(*offers), wanted) == message


# -- who is needed
# --------------------------------------------------------------------------------------------------


def test_of_ranks_that_hold_the_same_only_so_many_are_needed_the_first_ones_first() -> None:
    low, high = a_box((0,), (4,), (8,)), a_box((4,), (4,), (8,))
    origins = offered(low, low, high, low, high, high)
    dst = a_manifest(a_box((0,), (8,), (8,)))
    assert needed(origins, dst, 1) == [0, 2]
    assert needed(origins, dst, 2) == [0, 1, 2, 4]
    assert needed(origins, a_manifest(a_box((5,), (2,), (8,))), 9) == [2, 4, 5]
    assert needed(origins, dst, 2, far=[1, 2, 3]) == [0, 2, 4]


@pytest.mark.parametrize(
    "stranger",
    [
        pytest.param(an_entry("w", nbytes=8), id="no box"),
        pytest.param(a_box((0,), (8,), (8,), dtype="int8"), id="another dtype"),
        pytest.param(a_box((0, 0), (8, 1), (8, 1)), id="part of something else"),
        pytest.param(an_entry("other"), id="another name"),
    ],
)
def test_a_rank_whose_tensor_of_that_name_is_another_one_does_not_stand_in_for_it(
    stranger: TensorEntry,
) -> None:
    whole = a_box((0,), (8,), (8,))
    assert needed(offered(stranger, whole), a_manifest(whole), 1) == [1]
    assert parts(offered(stranger, whole), whole) == [Span(1000, 8, ((1, 1000),))]


def test_somebody_is_needed_even_where_nothing_is_wanted() -> None:
    assert needed(offered(an_entry()), Manifest((), ()), 1) == [0]


@given(reshardings(), st.integers(1, 3))
def test_those_that_are_needed_have_all_that_is_wanted(ranks: Resharding, most: int) -> None:
    origins = origins_of(ranks.sources)
    some = needed(origins, ranks.dst.manifest, most)
    assert differences([origins[number] for number in some], ranks.dst.manifest) == []
    assert some == sorted(set(some))
