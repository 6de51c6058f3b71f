"""Which held tensor is taken for which wanted one, and what is in the way."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from engine_loader.adopting.matching import blocks_of, match
from engine_registry import TensorEntry


def entry(name: str, addr: int = 4096, rows: int = 4, **fields: object) -> TensorEntry:
    shape = (rows, 2)
    made = TensorEntry(name, "float32", shape, addr if rows else 0, 8 * rows, shape, (0, 0))
    return replace(made, **fields)  # type: ignore[arg-type]


def problems(held: list[TensorEntry], wanted: list[TensorEntry]) -> list[str]:
    return match(held, wanted)[1]


def test_equal_tensors_are_found_wherever_they_lie() -> None:
    held = [entry("a", 4096), entry("b", 8192), entry("empty", rows=0)]
    wanted = [entry("b", 100), entry("empty", rows=0), entry("a", 900)]
    found, wrong = match(held, wanted)
    assert wrong == []
    assert found == {one.name: one for one in held}


def test_each_difference_is_a_line() -> None:
    assert problems([entry("a")], [entry("a", dtype="bfloat16")]) == [
        "a: dtype float32 held, bfloat16 here"
    ]
    assert problems([entry("a")], [entry("a", rows=3)]) == ["a: shape 4x2 held, 3x2 here"]
    assert problems([entry("a")], [entry("a", strides=(1, 4))]) == [
        "a: contiguous held, strides [1, 4] here"
    ]
    assert problems([entry("a"), entry("b", 8192)], [entry("a"), entry("c", 8192)]) == [
        "b: held, but not here",
        "c: here, but not held",
    ]


def test_a_box_that_is_stated_must_be_the_one_that_is_held() -> None:
    half = entry("a", opaque=False, global_shape=(8, 2), offsets=(4, 0))
    assert problems([half], [half]) == []
    assert problems([half], [entry("a")]) == []  # which says nothing
    other = replace(half, offsets=(0, 0))
    assert problems([half], [other]) == ["a: another part of the whole is held"]
    assert problems([entry("a")], [half]) == ["a: another part of the whole is held"]


def test_of_tied_tensors_one_name_is_enough_on_either_side() -> None:
    one, two = entry("a"), entry("b")
    assert match([one, two], [one]) == ({"a": one}, [])
    assert match([one], [one, two]) == ({"a": one, "b": one}, [])
    assert problems([entry("e", rows=0)], [entry("e", rows=0), entry("f", rows=0)]) == [
        "f: here, but not held"
    ]


def test_tensors_that_share_memory_must_share_it_in_the_same_way_on_both_sides() -> None:
    here = [entry("a", 100), entry("b", 200)]
    tied = [entry("a", 4096), entry("b", 4096)]
    assert problems(tied, here) == [
        "b: shares memory with a where it is held, but not in the same way here"
    ]
    assert problems(here, tied) == [
        "b: shares memory with a where it is here, but not in the same way held"
    ]
    assert problems(tied, tied) == []
    apart = [entry("a", 4096), entry("b", 4104)]
    assert len(problems(tied, apart)) == 1
    assert problems(apart, [entry("a", 0), entry("b", 8)]) == []


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=8), st.integers(0, 9000))
def test_whatever_overlaps_moves_together(places: list[tuple[int, int]], shift: int) -> None:
    held = [entry(f"t{number}", 8 * at + 8, rows) for number, (at, rows) in enumerate(places)]
    moved = [replace(one, addr=one.addr + shift) if one.nbytes else one for one in held]
    found, wrong = match(held, moved)
    assert wrong == []
    assert {name: one.addr for name, one in found.items()} == {one.name: one.addr for one in held}
    blocks = blocks_of(found)
    bytes_of = [
        {at for one in block.values() for at in range(one.addr, one.addr + one.nbytes)}
        for block in blocks
    ]
    assert {name for block in blocks for name in block} == {one.name for one in held if one.nbytes}
    for number, some in enumerate(bytes_of):
        assert len(some) == max(some) - min(some) + 1  # they overlap one after another
        assert not any(some & others for others in bytes_of[:number])
