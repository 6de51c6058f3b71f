"""Tensors as memory: each storage once, and what is not plain memory refused by name."""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine_loader import Arena, Shard
from engine_loader.errors import TensorsUnusable
from engine_loader.tensors.dtypes import dtype_name, dtype_named
from engine_loader.tensors.regions import describe
from engine_loader.tensors.shards import is_sharded, local_parts
from engine_registry import Region, TensorEntry

DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str
)


def storage_of(tensor: torch.Tensor) -> Region:
    storage = tensor.untyped_storage()
    return Region(storage.data_ptr(), storage.nbytes())


def test_a_tensor_is_described_by_name_dtype_shape_and_place() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    manifest = describe({"w": tensor})
    assert manifest.tensors == (
        TensorEntry("w", "bfloat16", (2, 3), tensor.data_ptr(), 12, (2, 3), (0, 0), opaque=True),
    )
    assert manifest.regions == (storage_of(tensor),)


def test_tensors_keep_their_order_and_regions_come_by_address() -> None:
    tensors = {name: torch.zeros(5) for name in ("z", "a", "m")}
    manifest = describe(tensors)
    assert [entry.name for entry in manifest.tensors] == ["z", "a", "m"]
    assert list(manifest.regions) == sorted(
        map(storage_of, tensors.values()), key=lambda region: region.addr
    )


def test_a_scalar_and_a_parameter_are_tensors_like_others() -> None:
    manifest = describe(
        {"scale": torch.tensor(2.5, dtype=torch.float64), "w": torch.nn.Parameter(torch.ones(3))}
    )
    assert [(entry.shape, entry.offsets, entry.nbytes) for entry in manifest.tensors] == [
        ((), (), 8),
        ((3,), (0,), 12),
    ]


def test_views_of_one_storage_share_one_region_of_the_whole_storage() -> None:
    base = torch.zeros(10, 4)
    manifest = describe({"head": base[:2], "tail": base[7:], "flat": base.view(-1)[8:12]})
    assert manifest.regions == (storage_of(base),)
    assert [entry.addr - base.data_ptr() for entry in manifest.tensors] == [0, 7 * 16, 32]


def test_tied_tensors_keep_their_common_address() -> None:
    weight = torch.zeros(4, 4)
    manifest = describe({"embed": weight, "head": weight, "again": weight.view(16)})
    assert {entry.addr for entry in manifest.tensors} == {weight.data_ptr()}
    assert manifest.regions == (storage_of(weight),)


PAGE = mmap.PAGESIZE


@pytest.mark.parametrize(
    ("gap", "joined"),
    [
        (0, True),
        (1, True),
        (PAGE - 1, True),
        (PAGE, True),
        (2 * PAGE - 2, True),
        (2 * PAGE - 1, False),
        (3 * PAGE, False),
    ],
)
def test_of_very_many_storages_those_become_one_region_that_have_no_whole_page_between_them(
    monkeypatch: pytest.MonkeyPatch, gap: int, joined: bool
) -> None:
    monkeypatch.setattr("engine_loader.tensors.regions._MANY_STORAGES", 1)
    with mmap.mmap(-1, 5 * PAGE) as memory:
        buffer = memoryview(memory)
        starts = (0, 1 + gap)  # one byte at the beginning of a page, one after the gap
        tensors = {
            f"t{start}": torch.frombuffer(buffer[start : start + 1], dtype=torch.uint8)
            for start in starts
        }
        base = tensors["t0"].data_ptr()
        found = [(region.addr - base, region.nbytes) for region in describe(tensors).regions]
        assert found == ([(0, gap + 2)] if joined else [(0, 1), (1 + gap, 1)])
        monkeypatch.setattr("engine_loader.tensors.regions._MANY_STORAGES", 2)
        assert len(describe(tensors).regions) == 2
        tensors.clear()
        buffer.release()


def test_an_arena_on_the_host_is_never_one_region_with_its_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Peers map each by itself."""
    monkeypatch.setattr("engine_loader.tensors.regions._MANY_STORAGES", 1)
    arenas = [Arena("cpu", PAGE) for _ in range(4)]  # the kernel puts some beside each other
    tensors = {
        f"t{number}": arena.empty((8,), torch.float32) for number, arena in enumerate(arenas * 2)
    }
    try:
        assert {*describe(tensors).regions} == {arena.region for arena in arenas}
    finally:
        for arena in arenas:
            arena.close()


def test_a_hundred_thousand_small_tensors_are_few_regions_that_hold_them_all() -> None:
    tensors = {f"t{number}": torch.zeros(64) for number in range(100_000)}
    manifest = describe(tensors)
    assert len(manifest.regions) < 1_000
    starts = [region.addr for region in manifest.regions]
    for entry in manifest.tensors:
        region = manifest.regions[bisect.bisect_right(starts, entry.addr) - 1]
        assert region.addr <= entry.addr
        assert entry.addr + entry.nbytes <= region.end


def test_tensors_without_bytes_have_no_address_and_need_no_region() -> None:
    manifest = describe(
        {"empty": torch.empty(0, 7), "sliced": torch.zeros(5)[5:], "turned": torch.empty(3, 0).t()}
    )
    assert [(entry.addr, entry.nbytes) for entry in manifest.tensors] == [(0, 0)] * 3
    assert manifest.regions == ()


def test_no_tensors_are_an_empty_manifest() -> None:
    assert describe({}) == describe({}, {})
    assert (describe({}).tensors, describe({}).regions) == ((), ())


@pytest.mark.parametrize(
    ("second", "wanted"),
    [
        ((32, 64), [(0, 96)]),
        ((16, 16), [(0, 64)]),
        ((0, 96), [(0, 96)]),
        ((0, 32), [(0, 64)]),
        ((64, 32), [(0, 64), (64, 32)]),
    ],
    ids=["overlap", "inside", "longer from the same beginning", "shorter", "side by side"],
)
def test_storages_that_overlap_in_a_foreign_buffer_become_one_region(
    second: tuple[int, int], wanted: list[tuple[int, int]]
) -> None:
    with mmap.mmap(-1, 4096) as memory:
        buffer = memoryview(memory)
        start, nbytes = second
        tensors = {
            "a": torch.frombuffer(buffer[:64], dtype=torch.uint8),
            "b": torch.frombuffer(buffer[start : start + nbytes], dtype=torch.uint8),
        }
        base = tensors["a"].data_ptr()
        manifest = describe(tensors)
        assert [(region.addr - base, region.nbytes) for region in manifest.regions] == wanted
        tensors.clear()
        buffer.release()


def test_all_that_cannot_be_used_is_reported_at_once() -> None:
    tensors = {
        "good": torch.zeros(3),
        **{name: torch.zeros(2, 2, device="meta") for name in ("a", "b")},
    }
    shards = {"good": Shard((2,), (0,)), "unheard": Shard((2,), (0,))}
    with pytest.raises(TensorsUnusable, match=r"^4 tensors cannot be used as is: ") as caught:
        describe(tensors, shards)
    assert [problem.split(":")[0] for problem in caught.value.details["problems"]] == [
        "good",
        "a",
        "b",
        "unheard",
    ]


def test_a_shard_says_which_box_of_the_whole_a_tensor_is() -> None:
    (entry,) = describe({"w": torch.zeros(2, 3)}, {"w": Shard((4, 6), (2, 3))}).tensors
    assert (entry.shape, entry.global_shape, entry.offsets, entry.opaque) == (
        (2, 3),
        (4, 6),
        (2, 3),
        False,
    )


def test_a_shard_that_is_the_whole_is_a_statement_too() -> None:
    (entry,) = describe({"w": torch.zeros(2, 3)}, {"w": Shard((2, 3), (0, 0))}).tensors
    assert not entry.opaque


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        (Shard((4, 6), (3, 0)), r"shard at \[3, 0\] of shape \[2, 3\] does not fit into \[4, 6\]"),
        (Shard((4, 6), (0, 4)), "does not fit into"),
        (Shard((4, 6), (-1, 0)), "does not fit into"),
        (Shard((1, 6), (0, 0)), "does not fit into"),
        (Shard((4,), (0,)), "does not have the 2 dimensions of the tensor"),
        (Shard((4, 6), (0,)), "does not have the 2 dimensions of the tensor"),
        (Shard((), ()), "does not have the 2 dimensions of the tensor"),
    ],
)
def test_a_shard_that_does_not_fit_is_refused(shard: Shard, said: str) -> None:
    with pytest.raises(TensorsUnusable, match=f"w: .*{said}"):
        describe({"w": torch.zeros(2, 3)}, {"w": shard})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_of_this_torch_comes_back_from_its_name(dtype: torch.dtype) -> None:
    assert dtype_named(dtype_name(dtype)) is dtype


@pytest.mark.parametrize("name", ["float128", "", "Tensor", "torch.float32", "nn", "__doc__"])
def test_a_name_that_is_no_dtype_is_refused(name: str) -> None:
    with pytest.raises(TensorsUnusable, match=f"dtype '{name}' is unknown to torch"):
        dtype_named(name)


@pytest.mark.parametrize(
    ("name", "said"), [(1, "its name is a int, not a string"), ("w\udc80", "its name is not text")]
)
def test_a_tensor_whose_name_no_manifest_can_hold_is_refused(name: Any, said: str) -> None:
    with pytest.raises(TensorsUnusable, match=said):
        describe({name: torch.zeros(1)})


# -- DTensors
# --------------------------------------------------------------------------------------------------


@pytest.fixture(params=range(4))
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of a job of four, in which nobody else takes part."""
    number: int = request.param
    dist.init_process_group("fake", rank=number, world_size=4, store=FakeStore())
    yield number
    dist.destroy_process_group()


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return DeviceMesh("cpu", torch.arange(4).reshape(shape))


def part_of(whole: torch.Tensor, mesh: DeviceMesh, *placements: Any) -> DTensor:
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


@pytest.mark.parametrize(
    ("mesh", "placements", "shape", "boxes"),
    [
        ((4,), [Split(0)], (8, 3), [((2, 3), (start, 0)) for start in (0, 2, 4, 6)]),
        ((4,), [Split(1)], (3, 8), [((3, 2), (0, start)) for start in (0, 2, 4, 6)]),
        (
            (4,),
            [Split(0)],
            (6, 3),
            [((2, 3), (0, 0)), ((2, 3), (2, 0)), ((2, 3), (4, 0)), ((0, 3), (6, 0))],
        ),
        ((4,), [Split(0)], (2,), [((1,), (0,)), ((1,), (1,)), ((0,), (2,)), ((0,), (2,))]),
        ((4,), [Replicate()], (3, 2), [((3, 2), (0, 0))] * 4),
        ((4,), [Replicate()], (), [((), ())] * 4),
        ((2, 2), [Replicate(), Split(0)], (4, 2), [((2, 2), (0, 0)), ((2, 2), (2, 0))] * 2),
        (
            (2, 2),
            [Split(0), Split(1)],
            (4, 6),
            [((2, 3), (0, 0)), ((2, 3), (0, 3)), ((2, 3), (2, 0)), ((2, 3), (2, 3))],
        ),
        (
            (2, 2),
            [Split(0), Split(0)],
            (8,),
            [((2,), (0,)), ((2,), (2,)), ((2,), (4,)), ((2,), (6,))],
        ),
        # Data parallelism divides what tensor parallelism has left: it comes first in the mesh, but
        # splits last.
        (
            (2, 2),
            [_StridedShard(0, split_factor=2), Split(0)],
            (8,),
            [((2,), (0,)), ((2,), (4,)), ((2,), (2,)), ((2,), (6,))],
        ),
    ],
    ids=[
        "rows",
        "columns",
        "uneven",
        "few rows",
        "replicated",
        "scalar",
        "replicated rows",
        "both ways",
        "twice",
        "dp over tp",
    ],
)
def test_a_dtensor_says_which_box_it_is(
    rank: int,
    mesh: tuple[int, ...],
    placements: list[Any],
    shape: tuple[int, ...],
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    local_shape, offsets = boxes[rank]
    part = torch.rand(local_shape)
    tensor = DTensor.from_local(
        part, mesh_of(mesh), placements, shape=torch.Size(shape), stride=torch.empty(shape).stride()
    )
    parts, found = local_parts({"w": tensor})
    assert found == {"w": Shard(shape, offsets)}
    assert (tuple(parts["w"].shape), parts["w"].data_ptr(), is_sharded(parts["w"])) == (
        local_shape,
        part.data_ptr(),
        False,
    )


def test_plain_tensors_keep_the_shards_that_are_stated(rank: int) -> None:
    plain, stated = torch.rand(2), {"w": Shard((8,), (2 * rank,))}
    tensors = {"w": plain, "v": plain, "d": part_of(torch.rand(4), mesh_of((4,)), Split(0))}
    parts, found = local_parts(tensors, stated)
    assert (parts["w"], parts["v"]) == (plain, plain)
    assert found == {**stated, "d": Shard((4,), (rank,))}
    assert stated == {"w": Shard((8,), (2 * rank,))}


def test_a_parameter_that_is_a_dtensor_is_read_without_its_gradients(rank: int) -> None:
    parameter = torch.nn.Parameter(part_of(torch.rand(8), mesh_of((4,)), Split(0)))
    parts, _ = local_parts({"w": parameter})
    assert not parts["w"].requires_grad
    assert len(describe(parts).regions) == 1


def test_a_dtensor_of_other_ranks_only_is_left_out(rank: int) -> None:
    others = DeviceMesh("cpu", [1, 2])
    parts, found = local_parts({"w": DTensor.from_local(torch.rand(2), others, [Split(0)])})
    assert (list(parts), found) == (
        (["w"], {"w": Shard((4,), (2 * (rank - 1),))}) if rank in (1, 2) else ([], {})
    )


@pytest.mark.parametrize(
    ("placements", "said"),
    [
        (
            [Partial(), Replicate()],
            r"is a partial sum over its device mesh: call \.redistribute\(\) first",
        ),
        ([Split(0), Partial()], "is a partial sum"),
        ([Split(0), _StridedShard(0, split_factor=2)], "is split with gaps"),
        ([_StridedShard(0, split_factor=2), Replicate()], "is split with gaps"),
        ([_StridedShard(0, split_factor=4), Split(0)], "is split with gaps"),
        ([_StridedShard(0, split_factor=2), Split(1)], "is split with gaps"),
    ],
    ids=str,
)
def test_a_dtensor_whose_part_is_no_box_is_refused(
    rank: int, placements: list[Any], said: str
) -> None:
    tensor = DTensor.from_local(torch.rand(2, 2), mesh_of((2, 2)), placements)
    with pytest.raises(TensorsUnusable, match=f"^1 tensor cannot be used as is: w: {said}"):
        local_parts({"w": tensor})


def test_a_dtensor_with_a_shard_stated_besides_is_refused(rank: int) -> None:
    with pytest.raises(
        TensorsUnusable,
        match="w: has a shard stated, but is a DTensor, which says itself which part it is",
    ):
        local_parts(
            {"w": part_of(torch.rand(4), mesh_of((4,)), Split(0))}, {"w": Shard((4,), (0,))}
        )
