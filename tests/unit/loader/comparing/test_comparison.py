"""What differs between instances, and what digests do not prove."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine_loader import Aspect, Comparison, Obstacle
from engine_loader.comparing.comparison import compare_holdings
from engine_loader.comparing.holding import HeldRank, Holding
from engine_registry import Manifest, Place, TensorEntry
from tests.support.builders import an_entry

A, B = b"a" * 16, b"b" * 16


def whole(name: str = "w", shape: tuple[int, ...] = (8, 2), **changes: Any) -> TensorEntry:
    """Each name has memory for itself, unless `addr` says otherwise."""
    addr = changes.pop("addr", 4096 * (1 + sum(name.encode())))
    return an_entry(name, addr, shape=shape, opaque=False, global_shape=shape, **changes)


def part(start: int, rows: int = 4, name: str = "w") -> TensorEntry:
    """Rows of a whole of 8 x 2."""
    entry = an_entry(name, shape=(rows, 2), opaque=False)
    return replace(entry, global_shape=(8, 2), offsets=(start, 0))


def side(
    name: str,
    *ranks: Mapping[TensorEntry, bytes] | None,
    silent: tuple[TensorEntry, ...] = (),
    algorithm: str = "xxh3_128",
) -> Holding:
    """Each rank has these tensors with these digests; None: the `silent` ones, without digests."""
    return Holding(
        name,
        [
            HeldRank(
                f"{name}/{number}",
                Place(number, len(ranks)),
                Manifest(tuple(rank if rank is not None else silent), ()),
                None if rank is None else {entry.name: one for entry, one in rank.items()},
                algorithm,
            )
            for number, rank in enumerate(ranks)
        ],
    )


def differing(*sides: Holding) -> list[tuple[str, Aspect, dict[str, str]]]:
    found = compare_holdings(sides)
    return [(one.tensor, one.aspect, dict(one.values)) for one in found.differences]


def counts(found: Comparison) -> tuple[bool, int, int]:
    return found.same, found.tensors, found.compared


def test_instances_that_hold_the_same_are_the_same() -> None:
    one, other = side("a", {whole(): A}), side("b", {whole(): A})
    found = compare_holdings([one, other])
    assert counts(found) == (True, 1, 1)
    assert found.sides == ("a", "b")


def test_a_tensor_that_one_side_lacks_is_named_with_what_the_other_has() -> None:
    assert differing(side("a", {whole(): A, whole("x"): B}), side("b", {whole(): A})) == [
        ("x", Aspect.NAME, {"a": "uint8 8x2", "b": ""})
    ]


def test_dtypes_shapes_and_bytes_differ_one_at_a_time_and_in_the_order_of_the_names() -> None:
    names = ("layers.10.w", "layers.9.w", "layers.2.w")
    one = side("a", {whole(name): A for name in names})
    other = side(
        "b",
        {
            whole(names[0], dtype="int8"): A,
            whole(names[1], shape=(4, 4)): A,
            whole(names[2]): B,
        },
    )
    assert differing(one, other) == [
        ("layers.2.w", Aspect.BYTES, {"a/0": "61616161", "b/0": "62626262"}),
        ("layers.9.w", Aspect.SHAPE, {"a": "8x2", "b": "4x4"}),
        ("layers.10.w", Aspect.DTYPE, {"a": "uint8", "b": "int8"}),
    ]


def test_digests_that_begin_alike_are_different_all_the_same() -> None:
    assert len(differing(side("a", {whole(): A}), side("b", {whole(): A[:15] + b"x"}))) == 1


def test_ranks_of_one_instance_are_compared_where_they_hold_the_same() -> None:
    held = {whole("norm"): A, part(0): A}, {whole("norm"): B, part(4): B}
    assert differing(side("a", *held)) == [
        ("norm", Aspect.BYTES, {"a/0": "61616161", "a/1": "62626262"})
    ]
    found = compare_holdings([side("a", {whole("norm"): A, part(0): A}, {whole("norm"): A})])
    assert counts(found) == (True, 2, 1)


def test_shards_are_compared_with_the_same_shards_whatever_ranks_have_them() -> None:
    one = side("a", {part(0): A}, {part(4): B})
    assert compare_holdings([one, side("b", {part(4): B}, {part(0): A})]).same
    assert differing(one, side("b", {part(0): B}, {part(4): B})) == [
        ("w", Aspect.BYTES, {"a/0": "61616161", "b/0": "62626262"})
    ]


def test_instances_that_are_cut_in_other_ways_are_compared_as_whole_tensors() -> None:
    cut = side("a", {part(0): A}, {part(4): B})
    found = compare_holdings([cut, side("b", {whole(): A})])
    assert (found.same, found.differences, found.unproven) == (False, (), {"w": Obstacle.LAYOUT})
    assert differing(cut, side("b", {whole(shape=(9, 2)): A})) == [
        ("w", Aspect.SHAPE, {"a": "8x2", "b": "9x2"})
    ]


def test_the_only_rank_of_an_instance_holds_whole_tensors_whether_it_says_so_or_not() -> None:
    silent = an_entry(shape=(8, 2))
    assert compare_holdings([side("a", {silent: A}), side("b", {whole(): A})]).same


def test_tensors_that_do_not_state_their_part_are_compared_between_equal_ranks() -> None:
    silent = an_entry(shape=(4, 2))
    one = side("a", {silent: A}, {silent: B})
    assert compare_holdings([one]).same
    assert compare_holdings([one, side("b", {silent: A}, {silent: B})]).same
    assert differing(one, side("b", {silent: A}, {silent: A})) == [
        ("w", Aspect.BYTES, {"a/1": "62626262", "b/1": "61616161"})
    ]
    other_size = side("b", {silent: A}, {silent: B}, {silent: B})
    assert compare_holdings([one, other_size]).unproven == {"w": Obstacle.LAYOUT}
    other_shape = an_entry(shape=(5, 2))
    assert differing(one, side("b", {silent: A}, {other_shape: B}))[0][1] is Aspect.SHAPE


def test_a_rank_without_digests_proves_nothing_and_is_named() -> None:
    silent = side("b", None, silent=(whole(),))
    for sides in ([silent], [side("a", {whole(): A}), silent]):
        found = compare_holdings(sides)
        assert (found.same, found.unproven) == (False, {"w": Obstacle.NO_DIGESTS})
        assert found.without_digests == ("b/0",)


def test_a_difference_is_found_although_another_rank_has_no_digests() -> None:
    sides = side("a", {whole(): A}), side("b", None, silent=(whole(),)), side("c", {whole(): B})
    assert [values for _, _, values in differing(*sides)] == [
        {"a/0": "61616161", "c/0": "62626262"}
    ]


def test_digests_by_other_algorithms_prove_nothing() -> None:
    one, other = side("a", {whole(): A}), side("b", {whole(): B}, algorithm="multilinear_64")
    assert compare_holdings([one, other]).unproven == {"w": Obstacle.ALGORITHM}


def test_digests_of_other_orders_in_memory_prove_nothing() -> None:
    transposed = side("b", {whole(strides=(1, 8)): B})
    assert compare_holdings([side("a", {whole(): A}), transposed]).unproven == {"w": Obstacle.ORDER}
    flat = side("a", {whole(shape=(8, 1)): A})
    assert compare_holdings([flat, side("b", {whole(shape=(8, 1), strides=(1, 1)): A})]).same


def test_a_further_name_of_the_same_memory_is_no_other_tensor() -> None:
    tied = side("a", {whole("embed", addr=4096): A, whole("head", addr=4096): A})
    assert compare_holdings([tied, side("b", {whole("embed"): A})]).same
    apart = side("a", {whole("embed", addr=4096): A, whole("head", addr=8192): A})
    assert [name for name, _, _ in differing(apart, side("b", {whole("embed"): A}))] == ["head"]
