"""Models whose memory moves into arenas, or becomes memory that is held: what comes along."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from engine_loader import TensorsUnusable
from engine_loader.integrations.arenas import Following, move_into_arenas
from engine_loader.integrations.tensors import aliases, loaded_tensors, runtime_tensors
from engine_loader.publishing.holding import check_can_be_held
from engine_loader.tensors.host_memory import memory_at


class Model(nn.Module):
    """With what engines do to their weights: ties, transposed ones, views with gaps, bare ones."""

    scale: torch.Tensor
    cache: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = nn.Parameter(self.embed.weight.data)  # tied, and another object
        self.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        padded = torch.arange(32.0).reshape(4, 8)
        self.padded = nn.Parameter(padded[:, :6])
        self.register_buffer("scale", torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("cache", self.scale.view(-1), persistent=False)
        self.tables = [torch.full((5,), 7.0)]


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in runtime_tensors(module).items()}


def are_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def objects(module: nn.Module) -> list[int]:
    return [id(one) for one in [*module.parameters(), *module.buffers()]]


def test_all_tensors_of_a_model_move_and_stay_the_same_objects() -> None:
    model = Model()
    before, ids = values(model), objects(model)
    move_into_arenas(runtime_tensors(model), model)
    assert are_equal(values(model), before)
    assert objects(model) == ids
    check_can_be_held(runtime_tensors(model))
    arenas = {memory_at(tensor.data_ptr()) for tensor in runtime_tensors(model).values()}
    assert len(arenas) == 1
    assert model.turned.stride() == (1, 3)
    assert (model.padded.stride(), model.padded.shape) == ((8, 1), (4, 6))


def test_tensors_that_share_memory_share_it_afterwards() -> None:
    model = Model()
    move_into_arenas(runtime_tensors(model), model)
    with torch.no_grad():
        model.embed.weight.fill_(5)
        model.scale.fill_(3)
    assert bool((model.head.weight == 5).all())
    assert bool((model.cache == 3).all())


def test_loaded_tensors_that_are_kept_for_peers_move_along() -> None:
    model = Model()
    kept = aliases(loaded_tensors(model))
    model.turned.data = model.turned.data.contiguous()  # as post-processing does
    move_into_arenas(kept, model)
    check_can_be_held(kept)
    with torch.no_grad():
        model.embed.weight.fill_(5)
    assert bool((kept["embed.weight"] == 5).all())
    assert memory_at(model.turned.data_ptr()) is None  # peers do not get it


def test_what_lies_in_an_arena_stays_there() -> None:
    model = Model()
    move_into_arenas(runtime_tensors(model), model)
    where = {name: tensor.data_ptr() for name, tensor in runtime_tensors(model).items()}
    move_into_arenas(runtime_tensors(model), model)
    assert {name: one.data_ptr() for name, one in runtime_tensors(model).items()} == where


def test_memory_that_something_else_uses_is_not_moved(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    kernel = model.turned.detach()  # in a closure, as far as we know
    where = model.turned.data_ptr()
    with pytest.raises(TensorsUnusable, match="no tensor of the model shows: turned"):
        move_into_arenas(runtime_tensors(model), model)
    assert kernel.data_ptr() == model.turned.data_ptr() == where
    assert not Following("a/0", model).may_adopt(runtime_tensors(model))
    assert "a/0 adopts no weights" in caplog.text


def test_a_tensor_moves_with_that_of_which_it_is_a_view() -> None:
    model = Model()
    whole = torch.arange(8.0)
    model.left, model.right = whole[:4], whole[4:]
    del whole
    before = values(model)
    move_into_arenas(runtime_tensors(model), model)
    check_can_be_held(runtime_tensors(model))
    assert are_equal(values(model), before)


def test_what_waits_for_the_collector_is_no_use_of_the_memory() -> None:
    model = Model()
    gc.disable()
    try:
        cycle: list[object] = [model.turned.detach()]
        cycle.append(cycle)
        del cycle
        move_into_arenas(runtime_tensors(model), model)
    finally:
        gc.enable()
    check_can_be_held(runtime_tensors(model))


def test_tensors_come_along_when_others_get_memory_that_is_held() -> None:
    model = Model()
    tensors = runtime_tensors(model)
    following = Following("a/0", model)
    assert following.may_adopt(tensors)
    before = values(model)
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        tensor.data = held[name]
    following.follow()
    assert are_equal(values(model), before)
    held["embed.weight"].fill_(5)
    held["scale"].fill_(3)
    (padded,) = [one for name, one in held.items() if name.startswith("padded|")]
    padded.view(torch.float32).fill_(9)
    assert bool((model.head.weight == 5).all())
    assert bool((model.cache == 3).all())
    assert bool((model.padded == 9).all())
    assert model.padded.shape == (4, 6)


def test_a_tensor_of_which_only_a_part_is_published_keeps_all_where_they_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Module()
    whole = torch.arange(8.0)
    model.part = nn.Parameter(whole[:4])
    model.register_buffer("rest", whole[2:], persistent=False)
    del whole
    assert not Following("a/0", model).may_adopt(loaded_tensors(model))
    assert "with a part of what is published: rest; rest, as a whole" in caplog.text
