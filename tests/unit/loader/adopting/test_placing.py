"""Tensors that get other memory: they stay the same objects, whatever they were before."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine_loader.adopting.placing import Wanted
from engine_loader.errors import TensorsUnusable
from engine_loader.tensors.shards import Shard

CPU = torch.device("cpu")


class Special(nn.Parameter):
    """As engines have them."""

    loader: str


def put(tensors: Mapping[str, torch.Tensor], views: Mapping[str, torch.Tensor]) -> None:
    wanted = Wanted(tensors, None)
    wanted.prepare(views)
    wanted.put(views)


def test_a_tensor_with_memory_becomes_a_view() -> None:
    tensor, view = torch.zeros(3, 4), torch.arange(12.0).view(3, 4)
    put({"a": tensor}, {"a": view})
    assert tensor.data_ptr() == view.data_ptr()
    assert torch.equal(tensor, view)


def test_a_parameter_stays_one_and_is_what_its_module_has() -> None:
    module = nn.Linear(4, 3)
    weight, view = module.weight, torch.arange(12.0).view(3, 4)
    put({"weight": module.weight}, {"weight": view})
    assert module.weight is weight
    assert weight.data_ptr() == view.data_ptr()
    assert isinstance(weight, nn.Parameter)
    module(torch.ones(2, 4)).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_parameter_on_the_meta_device_stays_the_same_object(requires_grad: bool) -> None:
    module = nn.Linear(4, 3, device="meta")
    module.weight = Special(torch.empty(3, 4, device="meta"), requires_grad)
    module.weight.loader = "mine"
    weight, view = module.weight, torch.arange(12.0).view(3, 4)
    put({"weight": module.weight}, {"weight": view})
    assert module.weight is weight
    assert type(weight) is Special
    assert weight.loader == "mine"
    assert weight.requires_grad is requires_grad
    assert weight.device == CPU
    assert weight.data_ptr() == view.data_ptr()


def test_a_tensor_on_the_meta_device_that_has_two_names_stays_one() -> None:
    tied, view = nn.Parameter(torch.empty(3, 4, device="meta")), torch.arange(12.0).view(3, 4)
    put({"a": tied, "b": tied}, {"a": view, "b": view.clone()})
    assert torch.equal(tied, view)


def test_an_empty_tensor_on_the_meta_device_gets_a_device() -> None:
    empty = torch.empty(0, 4, device="meta")
    put({"e": empty}, {"e": torch.empty(0, 4)})
    assert empty.device == CPU


def test_inference_mode_and_default_devices_of_the_caller_do_not_matter() -> None:
    tensor, view = torch.zeros(3), torch.arange(3.0)
    meta = torch.empty(3, device="meta")
    with torch.inference_mode(), torch.device("meta"):
        put({"a": tensor, "m": meta}, {"a": view, "m": view})
    assert torch.equal(tensor, view)
    assert torch.equal(meta, view)
    assert not meta.is_inference()


def test_addresses_say_which_tensors_share_memory_also_of_those_that_have_none() -> None:
    whole, other = torch.empty(6, device="meta"), torch.empty(6, device="meta")
    real = torch.zeros(6)
    wanted = Wanted(
        {"a": whole.view(2, 3), "b": whole[2:4], "c": other, "d": real, "e": real[3:]}, None
    )
    at = {entry.name: entry.addr for entry in wanted.entries}
    assert at["b"] - at["a"] == 8
    assert at["e"] - at["d"] == 12
    assert abs(at["c"] - at["a"]) > 1 << 40


def test_boxes_and_strides_of_tensors_on_the_meta_device_are_known() -> None:
    tensors = {"a": torch.empty(4, 2, device="meta"), "t": torch.empty(4, 2, device="meta").t()}
    wanted = Wanted(tensors, {"a": Shard((8, 2), (4, 0))})
    a, t = wanted.entries
    assert (a.opaque, a.global_shape, a.offsets) == (False, (8, 2), (4, 0))
    assert (t.opaque, t.shape, t.strides) == (True, (2, 4), (1, 2))


def test_what_cannot_be_replaced_is_refused_by_name_and_nothing_has_changed() -> None:
    whole = torch.empty(6, device="meta")
    weak = torch.empty(6, device="meta")
    reference = weakref.ref(weak)
    gaps = torch.empty(6, 2, device="meta")[:, 0]
    tensors = {
        "whole": whole,
        "view": whole.view(2, 3),
        "weak": weak,
        "gaps": gaps,
        "lazy": nn.LazyLinear(3, device="meta").weight,
        "sparse": torch.eye(3).to_sparse(),
    }
    with pytest.raises(TensorsUnusable) as caught:
        Wanted(tensors, {"whole": Shard((9,), (0,))})
    problems = {line.partition(":")[0] for line in caught.value.details["problems"]}
    assert problems == tensors.keys() - {"view"}
    assert reference() is weak


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of a job of four, in which nobody else takes part."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield DeviceMesh("cpu", torch.arange(4))
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_part_of_a_dtensor_gets_the_memory(mesh: DeviceMesh, device: str) -> None:
    local = torch.zeros(2, 3, device=device)
    tensor = nn.Parameter(
        DTensor.from_local(local, mesh, [Split(0)], shape=torch.Size((8, 3)), stride=(3, 1))
    )
    (entry,) = Wanted({"a": tensor}, None).entries
    assert (entry.shape, entry.global_shape, entry.opaque) == ((2, 3), (8, 3), False)
    view = torch.arange(6.0).view(2, 3)
    put({"a": tensor}, {"a": view})
    assert isinstance(tensor, nn.Parameter)
    part: DTensor = tensor.data  # type: ignore[assignment]
    assert isinstance(part, DTensor)
    assert part.placements == (Split(0),)
    assert part.to_local().data_ptr() == view.data_ptr()
    assert tensor.device == CPU


def test_a_shard_that_does_not_fit_is_refused() -> None:
    with pytest.raises(TensorsUnusable, match="does not fit"):
        Wanted({"a": torch.empty(4, device="meta")}, {"a": Shard((6,), (4,))})


def test_memory_on_another_device_is_a_difference() -> None:
    wanted = Wanted({"a": torch.zeros(3), "m": torch.empty(3, device="meta")}, None)
    gpu = torch.device("cuda:0")
    assert wanted.elsewhere({"a": CPU, "m": gpu}) == []
    assert wanted.elsewhere({"a": gpu, "m": gpu}) == ["a: on cuda:0 held, on cpu here"]
