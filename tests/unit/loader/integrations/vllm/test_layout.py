"""Which part of the model vLLM's layers say that a tensor is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from engine_loader.integrations.tensors import loaded_tensors
from engine_loader.integrations.vllm.layout import Layout
from engine_loader.tensors.meta import like
from engine_loader.tensors.shards import Shard
from tests.support.vllm_layers import (
    Attention,
    ColumnParallelLinear,
    Layer,
    MergedColumnParallelLinear,
    Model,
    ReplicatedLinear,
    RMSNorm,
    RowParallelLinear,
    checkpoint,
    experts,
    qkv,
    vocabulary,
)


class OfAModel(Layer):
    """It cuts its weight as it likes."""


def layout_of(module: nn.Module) -> Layout:
    return Layout(module, loaded_tensors(module))


def part(module: nn.Module) -> Shard | None:
    """Of the one tensor that it has."""
    layout = layout_of(module)
    (name,) = loaded_tensors(module)
    assert (name in layout.unknown) != (name in layout.shards)
    return layout.shards.get(name)


def cut(whole: torch.Tensor, shard: Shard) -> torch.Tensor:
    """The part of the whole tensor that the shard states."""
    for dim, slices in shard.slices.items():
        whole = torch.cat([whole.narrow(dim, at, stop - at) for at, stop in slices], dim)
    return whole


def whole_tensors() -> dict[str, torch.Tensor]:
    """Of a checkpoint: fused, and padded, as one rank of one has them."""
    model = Model()
    model.load_weights(checkpoint())
    return loaded_tensors(model)


@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)])
def test_each_tensor_is_the_part_that_its_loader_fills_it_with(size: int, rank: int) -> None:
    model = Model(rank, size)
    model.load_weights(checkpoint())
    layout = layout_of(model)
    whole = whole_tensors()
    assert layout.unknown == []
    for name, tensor in loaded_tensors(model).items():
        shard = layout.shards[name]
        assert shard.global_shape == tuple(whole[name].shape), name
        assert torch.equal(cut(whole[name].float(), shard), tensor.float()), name


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_all_ranks_are_the_whole(size: int) -> None:
    layouts = [layout_of(Model(rank, size)) for rank in range(size)]
    for name, whole in whole_tensors().items():
        seen = torch.zeros(whole.shape)
        for shard in [layout.shards[name] for layout in layouts]:
            sides = [shard.slices.get(dim, [(0, side)]) for dim, side in enumerate(whole.shape)]
            for box in itertools.product(*sides):
                seen[tuple([slice(*some) for some in box])] += 1
        assert bool((seen > 0).all()), name


def test_a_bias_is_cut_only_where_the_outputs_are() -> None:
    assert part(RowParallelLinear(1, 2).add("bias", 4, input_dim=None)) == Shard((4,), (0,))
    expected = Shard((8,), (0,), {0: [(4, 8)]})
    assert part(ColumnParallelLinear(1, 2).add("bias", 4)) == expected


def test_added_tokens_are_after_all_tokens_of_the_model() -> None:
    assert part(vocabulary(1, 2, added=64)) == Shard(
        (192, 16), (0, 0), {0: [(64, 128), (160, 192)]}
    )


def marked(**marks: Any) -> Layer:
    return ColumnParallelLinear().add("weight", 4, 6, **marks)


@pytest.mark.parametrize(
    "layer",
    [
        OfAModel().add("weight", 4, 6),
        MergedColumnParallelLinear(1, 2, output_sizes=[8, 4, 8]).add("weight", 3, 5),
        qkv(1, 2).add("weight", 45, 6),  # it has more than queries, keys and values
        marked(is_sharded_weight=True),
        marked(weight_loader=print),
        marked(weight_loader=ColumnParallelLinear().weight_loader),
        Attention(heads=2),  # each rank has scales of its heads
        nn.ParameterList([torch.ones(4)]),  # a parameter of the model
        experts(1, 2).add("w13_weight_scale", 3, 8, 6),
        *[
            experts(1, 2, **changes).add("w13_weight", 3, 24, 16)
            for changes in (
                {"quant_config": object()},
                {"has_bias": True},
                {"is_act_and_mul": False},
                {"hidden_dim": 32},
                {"intermediate_size_per_partition": 16},
                {"use_ep": True},
                {"dp_size": 2},
                {"pcp_size": 2},
            )
        ],
    ],
)
def test_a_tensor_whose_cut_is_not_known_is_no_part(layer: nn.Module) -> None:
    assert part(layer) is None


def test_views_are_no_parts_and_tensors_need_no_memory() -> None:
    layer = nn.Sequential(marked())
    weight = layer.get_parameter("0.weight")
    for name, tensor in {
        "0.weight|float32[2x6]@0/6x1": weight,
        "0.weight": weight.detach(),
        "1.weight": weight,
    }.items():
        assert Layout(layer, {name: tensor}).unknown == [name]
    without = marked()
    weight = without.get_parameter("weight")
    torch.utils.swap_tensors(weight, like(weight, weight.detach().to("meta")))
    assert part(without) == part(marked()) is not None


class OwnModel(nn.Module):
    """A model that fills its weights in one of two ways."""

    def __init__(self, *, by_loaders: bool) -> None:
        super().__init__()
        self.up = marked()
        self.gate = ReplicatedLinear().add("weight", 4, 6)
        self.norm = RMSNorm(4)
        self.by_loaders = by_loaders

    def load_weights(self) -> None:
        for name in ("norm.weight", "gate.weight"):
            self.get_parameter(name).data.fill_(2)
        weight: Any = self.get_parameter("up.weight")
        if self.by_loaders:
            weight.weight_loader(weight, torch.full((4, 6), 2.0))
        else:
            weight.data.fill_(2)


@pytest.mark.parametrize("by_loaders", [True, False])
def test_a_model_that_fills_a_cut_tensor_by_itself_is_noticed(by_loaders: bool) -> None:
    model = OwnModel(by_loaders=by_loaders)
    with layout_of(model).checked() as missed:
        model.load_weights()
    assert missed == ([] if by_loaders else ["up.weight"])
    assert all(bool((one == 2).all()) for one in model.parameters())


def test_the_loaders_are_as_before_also_after_an_error() -> None:
    model = OwnModel(by_loaders=True)
    layout = layout_of(model)
    with pytest.raises(OSError, match="disk"), layout.checked():
        raise OSError("disk")
    assert layout_of(model).shards == layout.shards != {}
