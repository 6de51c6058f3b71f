"""From the shards of ranks to whole tensors and the files that they go into."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.errors import WeightsMismatch
from engine_loader.planning.whole import (
    Whole,
    file_names,
    index_of,
    into_files,
    is_file_of_a_model,
    whole_tensors,
)
from engine_registry import TensorEntry
from tests.support.builders import a_manifest, an_entry


def a_shard(
    name: str,
    shape: tuple[int, ...],
    whole: tuple[int, ...],
    offsets: tuple[int, ...],
    **changes: object,
) -> TensorEntry:
    """Of float32."""
    nbytes = 4 * prod(shape)
    options: dict[str, Any] = {
        "dtype": "float32",
        "shape": shape,
        "global_shape": whole,
        "offsets": offsets,
        "opaque": False,
        **changes,
    }
    return an_entry(name, nbytes=nbytes, **options)


def a_whole(name: str, nbytes: int = 4) -> Whole:
    return Whole(name, "uint8", (nbytes,), nbytes, opaque=False)


# -- whole tensors
# --------------------------------------------------------------------------------------------------


def test_shards_of_all_ranks_make_whole_tensors_in_the_order_of_memory_by_rank() -> None:
    ranks = [
        a_manifest(
            a_shard("late", (4, 8), (8, 8), (4 * rank, 0), addr=9000),
            a_shard("early", (2, 3), (2, 6), (0, 3 * rank), addr=8000),
            *([a_shard("stage", (3,), (3,), (0,), addr=7000)] if rank else []),
        )
        for rank in range(2)
    ]
    assert whole_tensors("a", ranks) == [
        Whole("early", "float32", (2, 6), 48, opaque=False),
        Whole("late", "float32", (8, 8), 256, opaque=False),
        Whole("stage", "float32", (3,), 12, opaque=False),
    ]


def test_uneven_shards_and_ones_without_elements_make_whole_tensors() -> None:
    ranks = [
        a_manifest(a_shard("w", (size,), (5,), (at,)))
        for at, size in ((0, 0), (0, 3), (3, 2), (5, 0))
    ]
    assert whole_tensors("a", ranks) == [Whole("w", "float32", (5,), 20, opaque=False)]


def test_tensors_without_dimensions_or_elements_are_whole() -> None:
    both = a_manifest(
        a_shard("scalar", (), (), ()), a_shard("empty", (0, 7), (0, 7), (0, 0), addr=0)
    )
    assert [(whole.name, whole.nbytes) for whole in whole_tensors("a", [both, both])] == [
        ("empty", 0),
        ("scalar", 4),
    ]


def test_all_that_an_only_rank_has_is_whole_whether_it_says_so_or_not() -> None:
    (whole,) = whole_tensors("a", [a_manifest(an_entry("w", nbytes=16))])
    assert whole == Whole("w", "uint8", (16,), 16, opaque=True)


def test_tensors_of_several_ranks_that_do_not_say_what_they_are_part_of_are_named() -> None:
    ranks = [
        a_manifest(an_entry("silent"), a_shard("w", (4,), (4,), (0,))),
        a_manifest(a_shard("w", (4,), (4,), (0,))),
    ]
    with pytest.raises(
        WeightsMismatch, match=r"1 of 2 tensors of 'a' do not say .*2 ranks: silent: .*`shards`"
    ) as caught:
        whole_tensors("a", ranks)
    assert caught.value.details == {"tensors": ["silent"]}


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (
            a_shard("w", (2, 4), (4, 4), (2, 0), dtype="int32"),
            ("w: has dtype int32 on rank 1, float32 on rank 0"),
        ),
        (
            a_shard("w", (2, 4), (8, 4), (2, 0)),
            r"w: is part of \[8, 4\] on rank 1, of \[4, 4\] on rank 0",
        ),
        (
            a_shard("w", (1, 4), (4, 4), (2, 0)),
            r"w: no rank has the part at \[3, 0\] of shape \[1, 4\], of \[4, 4\]",
        ),
        (
            a_shard("w", (2, 4), (4, 4), (0, 0)),
            r"w: no rank has the part at \[2, 0\] of shape \[2, 4\], of \[4, 4\]",
        ),
    ],
)
def test_shards_that_make_no_whole_are_refused_before_anything_is_read(
    other: TensorEntry, problem: str
) -> None:
    with pytest.raises(
        WeightsMismatch,
        match=f"the ranks of 'a' do not make whole tensors, nothing was read: {problem}: ",
    ):
        whole_tensors("a", [a_manifest(a_shard("w", (2, 4), (4, 4), (0, 0))), a_manifest(other)])


# -- files
# --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 20), max_size=30), st.integers(1, 25))
def test_every_tensor_is_in_one_file_in_order_and_no_file_of_several_is_too_large(
    sizes: list[int], max_nbytes: int
) -> None:
    wholes = [a_whole(str(number), nbytes) for number, nbytes in enumerate(sizes)]
    files = into_files(wholes, max_nbytes)
    assert [whole for file in files for whole in file] == wholes
    assert all(
        len(file) == 1 or sum(whole.nbytes for whole in file) <= max_nbytes
        for file in files
        if file
    )
    assert all(files) or (files == [[]] and not wholes)


def test_a_file_is_begun_only_where_the_next_tensor_has_no_room() -> None:
    files = into_files(
        [a_whole(name, nbytes) for name, nbytes in zip("abcde", (4, 6, 1, 30, 2), strict=True)], 10
    )
    assert [[whole.name for whole in file] for file in files] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_files_are_named_and_indexed_as_hugging_face_does() -> None:
    files = [[a_whole("b", 3), a_whole("c", 4)], [a_whole("a", 5)]]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert file_names(2) == names
    assert file_names(1) == ["model.safetensors"]
    assert index_of(files) == {
        "metadata": {"total_size": 12},
        "weight_map": {"a": names[1], "b": names[0], "c": names[0]},
    }


@pytest.mark.parametrize("count", [1, 2, 100_000])
def test_the_names_of_any_number_of_files_are_known_again(count: int) -> None:
    assert all(map(is_file_of_a_model, file_names(count)))
    assert is_file_of_a_model("model.safetensors.index.json")


@pytest.mark.parametrize(
    "name",
    [
        "rank-0.safetensors",
        "model.fp16.safetensors",
        "model-1-of-2.safetensors",
        "config.json",
        "xmodel.safetensors",
    ],
)
def test_other_files_are_not_taken_for_those_of_a_model(name: str) -> None:
    assert not is_file_of_a_model(name)
