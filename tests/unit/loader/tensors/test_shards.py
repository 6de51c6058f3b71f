"""What a shard of several boxes says of a tensor, and what is no such shard."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine_loader.errors import TensorsUnusable
from engine_loader.files.memory import shards_like
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.regions import describe
from engine_loader.tensors.shards import Shard, all_in_boxes
from engine_registry import TensorEntry

# Of a whole of 12 rows: four rows of queries, one of keys and one of values.
QKV = Shard((12, 8), (0, 0), {0: [(0, 4), (8, 9), (10, 11)]})


def described(shape: tuple[int, ...], shard: Shard) -> TensorEntry:
    (entry,) = describe({"w": torch.zeros(shape)}, {"w": shard}).tensors
    return entry


def test_a_fused_tensor_is_described_by_its_slices_along_each_dimension() -> None:
    entry = described((6, 4), Shard((12, 8), (0, 4), {0: [(4, 8), (9, 10), (11, 12)]}))
    assert (entry.global_shape, entry.offsets, entry.opaque) == ((12, 8), (4, 4), False)
    assert entry.slices == (((4, 8), (9, 10), (11, 12)), ((4, 8),))
    assert (entry.boxes, described((4, 8), Shard((12, 8), (0, 0))).boxes) == (3, 1)


@pytest.mark.parametrize(
    ("slices", "offsets"),
    [
        ({0: [(0, 4), (4, 5), (5, 6)]}, (0, 2)),
        ({0: [(2, 2), (4, 10), (0, 0)]}, (4, 2)),
        ({0: [(4, 10)], 1: [(0, 6)]}, (4, 0)),
    ],
    ids=["neighbours", "empty slices beside", "one along each dimension"],
)
def test_slices_that_are_one_box_are_stated_as_that_box(
    slices: dict[int, Any], offsets: tuple[int, ...]
) -> None:
    """So a fused tensor of the only rank equals a plain one that is the whole."""
    begin = (0, 0 if 1 in slices else 2)
    entry = described((6, 6), Shard((12, 8), begin, slices))
    assert (entry.offsets, entry.slices) == (offsets, None)


def test_slices_of_a_tensor_without_elements_are_none() -> None:
    entry = described((0, 8), Shard((12, 8), (0, 0), {0: [(3, 3), (5, 5)]}))
    assert (entry.offsets, entry.slices, entry.nbytes) == ((0, 0), None, 0)


def test_what_a_manifest_says_of_a_fused_tensor_is_a_shard_again() -> None:
    manifest = describe(
        {"w": torch.zeros(6, 8), "v": torch.zeros(2), "o": torch.zeros(3)},
        {"w": QKV, "v": Shard((4,), (2,))},
    )
    shards = shards_like(manifest)
    assert list(shards) == ["w", "v"]
    others = {"w": torch.zeros(6, 8), "v": torch.zeros(2)}
    assert [entry.along for entry in describe(others, shards).tensors] == [
        entry.along for entry in manifest.tensors[:2]
    ]


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        (Shard((12, 8), (0, 0), {0: [(0, 4), (8, 9)]}), "have 5 elements along dimension 0"),
        (Shard((12, 8), (0, 0), {0: [(0, 4), (11, 13)]}), "do not lie in 12 along dimension 0"),
        (Shard((12, 8), (1, 0), {0: [(0, 4), (8, 10)]}), "but begins at 1: say 0"),
        (Shard((12, 8), (0, 0), {2: [(0, 1)]}), "slices along dimension 2, the tensor has not"),
        (Shard((12, 8), (0, 1), {0: [(0, 4), (8, 10)]}), "does not fit into"),
    ],
)
def test_slices_that_do_not_make_the_tensor_are_refused(shard: Shard, said: str) -> None:
    with pytest.raises(TensorsUnusable, match=f"w: .*{said}"):
        described((6, 8), shard)


@pytest.mark.parametrize(
    "slices",
    [
        None,
        7,
        [(0, 4)],
        {0: 4},
        {0: [4]},
        {0: [(0, 4, 8)]},
        {0: [(0, 4.5)]},
        {0: [(0, True)]},
        {0: [(4, 0)]},
        {0: [(-1, 4)]},
        {-1: [(0, 4)]},
        {"0": [(0, 4)]},
    ],
    ids=str,
)
def test_what_is_no_list_of_slices_for_a_dimension_is_refused(slices: Any) -> None:
    with pytest.raises(TensorsUnusable, match="of a shard are not valid") as caught:
        Shard((12, 8), (0, 0), slices)
    assert caught.value.details["field"] == "slices"


def test_shards_are_compared_and_hashed_by_what_they_say() -> None:
    slices: Any = {0: ((0, 4), [8, 9], (10, 11))}
    same = Shard((12, 8), (0, 0), slices)
    assert (same, hash(same)) == (QKV, hash(QKV))
    assert same != Shard((12, 8), (0, 0), {0: [(0, 4), (8, 9), (11, 12)]})


@pytest.mark.parametrize(("named", "known"), [(["a", "b"], True), (["a"], False), ([], False)])
def test_which_part_each_tensor_is_can_be_known_without_memory(
    named: list[str], known: bool
) -> None:
    tensors = {name: torch.zeros(4, 8) for name in ("a", "b")}
    shards = {name: Shard((12, 8), (0, 0)) for name in named}
    assert Destination(tensors, shards).has_boxes is known
    on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    assert all_in_boxes(on_meta, shards) is known
