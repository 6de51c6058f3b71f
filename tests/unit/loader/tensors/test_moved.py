"""Each way to give a tensor other memory than it was described with is found and named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split

from engine_loader.tensors.regions import describe, moved
from engine_loader.tensors.shards import local_parts
from engine_registry import Manifest

Tensors = dict[str, torch.Tensor]


def given() -> Tensors:
    """`w` is the second half of its storage; `v` and `tied` are the same memory."""
    v = nn.Parameter(torch.rand(4, 3))
    w = torch.rand(16)[8:].view(2, 4)
    return {"v": v, "w": w, "tied": v, "t": torch.rand(3, 5).t(), "none": torch.empty(0, 3)}


def described(tensors: Tensors) -> Manifest:
    parts, boxes = local_parts(tensors)
    return describe(parts, boxes)


def set_at(tensor: torch.Tensor, offset: int) -> None:
    tensor.set_(tensor.untyped_storage(), offset, (2, 4), (4, 1))


IN_PLACE: dict[str, Callable[[Tensors], object]] = {
    "nothing": lambda tensors: None,
    "values": lambda tensors: tensors["w"].mul_(2),
    "another view of the parameter": lambda tensors: tensors.update(v=tensors["v"].detach()),
    "gradients": lambda tensors: tensors["v"].sum().backward(),
    "copied into": lambda tensors: tensors["t"].copy_(torch.ones(5, 3)),
    "the same memory once more": lambda tensors: set_at(tensors["w"], 8),
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_a_tensor_changed_in_place_has_not_moved(change: Callable[[Tensors], object]) -> None:
    tensors = given()
    manifest = described(tensors)
    change(tensors)
    assert moved(tensors, manifest) == []


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(2, 4)


def replace(tensor: torch.Tensor, by: torch.Tensor) -> None:
    tensor.data = by


def swap(tensor: torch.Tensor, other: torch.Tensor) -> None:
    torch.utils.swap_tensors(tensor, other)


MOVES: dict[str, tuple[Callable[[torch.Tensor], object], str]] = {
    "data replaced": (lambda w: replace(w, w.data * 2), "is now 32 bytes of float32 at 0x"),
    "converted": (lambda w: replace(w, w.double()), "is now 64 bytes of float64 at 0x"),
    "read otherwise": (lambda w: replace(w, w.data.view(torch.int32)), "is now 32 bytes of int32"),
    "storage freed": (lambda w: w.untyped_storage().resize_(0), "has no memory: its storage was"),
    "storage made larger": (lambda w: w.untyped_storage().resize_(1 << 20), "is now 32 bytes"),
    "storage made smaller": (lambda w: w.untyped_storage().resize_(48), "reaches to byte 64 of"),
    "another storage": (lambda w: w.set_(torch.zeros(2, 4).untyped_storage()), "is now 32 bytes"),
    "another place in it": (lambda w: set_at(w, 0), "is now 32 bytes"),
    "another shape": (lambda w: w.resize_(4, 2), r"is now 32 bytes of float32 .*shape \[4, 2\]"),
    "fewer elements": (lambda w: w.resize_(2, 2), "is now 16 bytes of float32 at 0x"),
    "no elements": (lambda w: w.resize_(0), "is now 0 bytes of float32 at 0x0, was 32"),
    "other strides": (
        lambda w: w.as_strided_((2, 4), (1, 2)),
        r"is now 32 bytes of float32 at 0x.* and strides \[1, 2\], was 32 bytes at",
    ),
    "gaps": (lambda w: w.as_strided_((2, 2), (4, 1)), "is not contiguous"),
    "swapped": (lambda w: swap(w, torch.zeros(2, 4)), "is now 32 bytes"),
    "swapped for a meta one": (
        lambda w: swap(w, torch.empty(2, 4, device="meta")),
        "is on the meta",
    ),
    "swapped for a fake one": (lambda w: swap(w, fake()), "is a FakeTensor without its own memory"),
    "swapped for a lazy one": (lambda w: swap(w, nn.UninitializedBuffer()), "is not initialized"),
    "swapped for a sparse one": (lambda w: swap(w, torch.eye(2).to_sparse()), "has layout torch"),
}


@pytest.mark.parametrize(("move", "said"), MOVES.values(), ids=MOVES)
def test_a_tensor_with_other_memory_is_named(
    move: Callable[[torch.Tensor], object], said: str
) -> None:
    tensors = given()
    manifest = described(tensors)
    move(tensors["w"])
    (problem,) = moved(tensors, manifest)
    assert problem.startswith("w: ")
    assert re.match(f"w: {said}", problem)


def test_a_module_that_is_converted_has_moved_in_all_its_names() -> None:
    module = nn.Linear(3, 2)
    tensors: Tensors = {**dict(module.named_parameters()), "tied": module.weight}
    manifest = described(tensors)
    module.to(torch.float64)
    problems = moved(tensors, manifest)
    assert [problem.split(":")[0] for problem in problems] == ["weight", "bias", "tied"]
    assert "is now 48 bytes of float64 at" in problems[0]


def test_a_tensor_that_gets_elements_has_moved() -> None:
    tensors = given()
    manifest = described(tensors)
    tensors["none"].resize_(2, 3)
    (problem,) = moved(tensors, manifest)
    assert problem.startswith("none: is now 24 bytes of float32 at")


# -- DTensors ------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def test_the_part_of_a_dtensor_that_has_other_memory_is_named(mesh: DeviceMesh) -> None:
    part = torch.rand(4, 3)
    module = nn.Module()
    module.w = nn.Parameter(DTensor.from_local(part, mesh, [Split(0)]))
    tensors = dict(module.named_parameters())
    manifest = described(dict(tensors))
    part.zero_()
    assert moved(tensors, manifest) == []
    module.to(torch.float64)
    assert moved(tensors, manifest)[0].startswith("w: is now 96 bytes of float64 at")


def test_a_dtensor_whose_part_was_freed_is_named(mesh: DeviceMesh) -> None:
    part = torch.rand(4, 3)
    tensors: Tensors = {"w": DTensor.from_local(part, mesh, [Split(0)])}
    manifest = described(tensors)
    part.untyped_storage().resize_(0)
    (problem,) = moved(tensors, manifest)
    assert problem.startswith("w: has no memory: its storage was freed")
