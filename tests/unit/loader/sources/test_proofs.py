"""Which tensors of sources prove those of a destination, and which of them may be summed up as they
are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine_loader.errors import DigestsMissing
from engine_loader.sources.proofs import Proofs, proofs_of
from engine_registry import Manifest, Region, TensorEntry
from tests.support.builders import a_manifest, an_entry


def rows(start: int, stop: int, addr: int = 4096, name: str = "w") -> TensorEntry:
    """Such rows of a whole of 6 rows of 8 bytes."""
    return an_entry(
        name,
        addr,
        8 * (stop - start),
        shape=(stop - start, 8),
        global_shape=(6, 8),
        offsets=(start, 0),
        opaque=False,
    )


def fused(*slices: tuple[int, int], addr: int = 4096) -> TensorEntry:
    """Such rows, one behind the other."""
    count = sum(stop - start for start, stop in slices)
    return an_entry(
        "w",
        addr,
        8 * count,
        shape=(count, 8),
        global_shape=(6, 8),
        offsets=(slices[0][0], 0),
        opaque=False,
        slices=(slices, ((0, 8),)),
    )


def proofs(sources: Sequence[Manifest], *wanted: TensorEntry) -> Proofs:
    return proofs_of(sources, a_manifest(*wanted) if wanted else Manifest((), ()))


def test_sources_whose_tables_say_the_same_are_one_group_wherever_their_tensors_lie() -> None:
    a, b = an_entry("a", 4096), an_entry("b", 8192)
    elsewhere = [an_entry("b", 1 << 20), an_entry("a", 1 << 21)]
    other = a_manifest(an_entry("c"))
    found = proofs([a_manifest(a, b), other, a_manifest(*elsewhere)], an_entry("a", 0), b)
    (group,) = found.groups
    assert group.numbers == (0, 2)
    assert group.names == ("a", "b")
    assert {piece.name: slot for piece, slot in zip(group.pieces, group.slots, strict=True)} == {
        "a": 0,
        "b": 1,
    }
    assert [piece.name for piece in group.pieces] == ["a", "b"]
    assert group.regions == (
        (Region(4096, 16), Region(8192, 16)),
        (Region(1 << 21, 16), Region(1 << 20, 16)),
    )


def test_each_group_has_the_places_of_its_pieces_in_its_own_table() -> None:
    sources = [a_manifest(rows(0, 3), an_entry("x", 8192)), a_manifest(rows(3, 6))]
    first, second = proofs(sources, rows(0, 6)).groups
    assert (first.names, first.slots, len(first.pieces)) == (("w", "x"), (0,), 1)
    assert (second.names, second.slots, len(second.pieces)) == (("w",), (0,), 1)


@pytest.mark.parametrize(
    ("places", "apart"),
    [
        ([(4096, 16), (4112, 16)], (0, 1)),
        ([(4096, 16), (4097, 16)], (0,)),
        ([(4096, 15), (4112, 16)], (1,)),
        ([(4096, 16), (4100, 16)], (0,)),
        ([(4100, 16), (4096, 16)], (1,)),
        ([(4096, 64), (4112, 16)], (0,)),
        ([(4098, 16), (4096, 64)], (1,)),
    ],
    ids=[
        "neighbours",
        "off a word",
        "no whole words",
        "sharing bytes",
        "in the other order",
        "one inside the other",
        "one that is not summed up inside the other",
    ],
)
def test_pieces_are_summed_up_that_are_whole_words_and_share_none_with_others(
    places: list[tuple[int, int]], apart: tuple[int, ...]
) -> None:
    entries = [
        an_entry(name, addr, nbytes) for name, (addr, nbytes) in zip("ab", places, strict=True)
    ]
    (group,) = proofs([a_manifest(*entries)], *entries).groups
    assert group.apart == apart
    assert group.regions == (tuple(Region(*places[number]) for number in apart),)


def test_what_cannot_be_summed_up_at_one_of_the_sources_is_at_none() -> None:
    wanted = [an_entry("a", 4096), an_entry("b", 8192)]
    moved = [an_entry("a", 4096), an_entry("b", 8193)]
    (group,) = proofs([a_manifest(*wanted), a_manifest(*moved)], *wanted).groups
    assert (group.numbers, group.apart) == ((0, 1), (0,))


def test_names_of_the_same_memory_here_are_proven_by_one_that_the_source_has() -> None:
    found = proofs([a_manifest(an_entry("head"))], an_entry("embed"), an_entry("head"))
    assert dict(found.tied) == {"embed": "head"}
    assert [piece.name for piece in found.groups[0].pieces] == ["head"]


def test_of_fused_parts_one_box_that_is_not_wanted_proves_nothing() -> None:
    sources = [a_manifest(fused((0, 2), (4, 6))), a_manifest(rows(2, 4))]
    with pytest.raises(DigestsMissing, match="1 of 1 tensors take only a part"):
        proofs(sources, fused((0, 2), (2, 5)))
    assert len(proofs(sources, fused((2, 6), (0, 2))).groups) == 2


@pytest.mark.parametrize("places", [[(0, 6)], [(0, 3), (3, 6)], [(1, 4)]])
def test_where_only_a_part_of_what_a_source_holds_is_wanted_nothing_proves_it(
    places: list[tuple[int, int]],
) -> None:
    bias = an_entry("bias", 8192)
    sources = [a_manifest(rows(*place)) for place in places] + [a_manifest(bias)]
    with pytest.raises(
        DigestsMissing, match=r'1 of 2 tensors take only a part.*: w: load with `verify="header"`'
    ) as caught:
        proofs(sources, rows(1, 5), bias)
    assert caught.value.details == {"tensors": ["w"]}


def test_tables_of_what_is_not_wanted_prove_nothing_and_nothing_needs_none() -> None:
    one, other = an_entry("a"), an_entry("b")
    found = proofs([a_manifest(one), a_manifest(other)], one)
    assert [group.numbers for group in found.groups] == [(0,)]
    assert proofs([a_manifest(one)]).groups == ()
    empty = an_entry("e", 0, 0, shape=(0,))
    assert proofs([a_manifest(one, empty)], empty).groups == ()


def test_proofs_are_made_once_for_the_same_sources_and_the_same_memory() -> None:
    a, b = an_entry("a", 4096), an_entry("a", 8192)
    source, other = a_manifest(a), a_manifest(a)
    here = a_manifest(a)
    first = proofs_of([source], here)
    assert proofs_of([source], here) is first
    assert proofs_of([source], a_manifest(a)) is first
    assert proofs_of([source], a_manifest(b)) is not first
    assert proofs_of([other], here) is not first
    assert proofs_of([source, other], here) is not first
