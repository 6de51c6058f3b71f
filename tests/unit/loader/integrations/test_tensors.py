"""Which tensors of a model are served."""

from __future__ import annotations

import torch
from torch import nn

from engine_loader.integrations.kept import Kept
from engine_loader.integrations.tensors import (
    aliases,
    loaded_tensors,
    memory_of,
    runtime_tensors,
)
from engine_loader.tensors.destination import Destination


class Method:
    """As a method of quantisation: no module, with tensors on it."""

    def __init__(self) -> None:
        self.workspace = torch.ones(3)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("cache", torch.ones(4), persistent=False)
        self.quant_method = Method()
        self.kv_cache = [torch.ones(9)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.layer = Layer()
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight  # tied


def test_a_checkpoint_fills_parameters_and_persistent_buffers_and_tied_ones_once() -> None:
    model = Model()
    found = loaded_tensors(model)
    assert list(found) == ["embed.weight", "layer.weight", "layer.scale"]
    assert found["layer.weight"] is model.layer.weight  # so a change of its memory is seen


def test_two_parameters_with_one_memory_are_one_tensor() -> None:
    model = Model()
    model.head.weight = nn.Parameter(model.embed.weight.data)
    assert "head.weight" not in loaded_tensors(model)


def test_the_engine_computes_with_all_buffers_and_with_bare_tensors() -> None:
    model = Model()
    model.layer.packed = torch.zeros(5)
    vars(model.layer)["tables"] = {"w1": torch.zeros(2)}
    assert set(runtime_tensors(model, skip=("kv_cache",))) == {
        "embed.weight",
        "layer.weight",
        "layer.scale",
        "layer.cache",
        "layer!packed",
        "layer!tables[w1]",
        "layer!quant_method.workspace",
    }


def test_a_view_with_gaps_is_served_as_the_bytes_of_its_storage() -> None:
    model = Layer()
    whole = torch.arange(32.0).reshape(4, 8)
    model.weight = nn.Parameter(whole[:, :6])
    found = runtime_tensors(model, skip=("kv_cache",))
    name = "weight|float32[4x6]@0/8x1"
    assert found[name].dtype == torch.uint8
    assert found[name].nbytes == whole.nbytes
    assert found[name].data_ptr() == whole.data_ptr()


def test_two_views_of_one_storage_bring_its_bytes_once_and_name_both() -> None:
    model = nn.Module()
    whole = torch.arange(32.0).reshape(4, 8)
    model.left, model.right = whole[:, :4], whole[:, 4:]
    found = runtime_tensors(model)
    assert list(found) == ["!left|float32[4x4]@0/8x1", "!right|float32[4x4]@4/8x1"]
    assert [tensor.nbytes for tensor in found.values()] == [whole.nbytes, 0]


def test_a_transposed_weight_is_served_as_it_is() -> None:
    model = Layer()
    model.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    assert "weight" in runtime_tensors(model)


def test_what_is_found_can_be_published() -> None:
    model = Model()
    model.layer.weight = nn.Parameter(torch.zeros(4, 8)[:, :6])
    found = runtime_tensors(model)
    assert set(Destination(found)) == set(found)


def test_an_alias_stays_when_the_parameter_gets_other_memory() -> None:
    model = Layer()
    kept = aliases(loaded_tensors(model))
    before = memory_of(kept.values())
    model.weight.data = torch.zeros(2, 3)
    assert memory_of(kept.values()) == before
    assert kept["weight"].sum() == 15


def test_weights_that_are_replaced_are_kept_unchanged_and_counted() -> None:
    model = Layer()
    kept = Kept(loaded_tensors(model))
    assert kept.extra_nbytes(model) == 0
    model.weight = nn.Parameter(model.weight.data.t().contiguous())
    assert kept.changed() == []
    assert kept.extra_nbytes(model) == 6 * 4


def test_weights_that_are_overwritten_are_noticed() -> None:
    model = Layer()
    kept = Kept(loaded_tensors(model))
    model.weight.data.mul_(2)
    assert kept.changed() == ["weight"]
