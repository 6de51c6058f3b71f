"""Layers with the names, attributes and loaders of vLLM's that count for how a model is cut, and a
small model of them. Each loader cuts as vLLM's does, by narrowing what the checkpoint has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

LAYERS = "vllm.model_executor.layers"
BLOCK = 4  # rows and columns of a block that has one scale
Kind = type["Layer"]


class Layer(nn.Module):
    """A layer of one rank. Its tensors are cut by `weight_loader`."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, rank: int = 0, size: int = 1, **more: Any) -> None:
        super().__init__()
        vars(self).update({"tp_rank": rank, "tp_size": size, **more})

    def add(
        self, leaf: str, *shape: int, dtype: torch.dtype = torch.float32, **marks: Any
    ) -> Layer:
        """A tensor of the rank, with the marks that its loader goes by."""
        parameter: Any = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
        parameter.weight_loader = self.weight_loader
        for name, value in {"output_dim": 0, "input_dim": 1, **marks}.items():
            setattr(parameter, name, value)
        self.register_parameter(leaf, parameter)
        return self

    def weight_loader(self, parameter: Any, loaded: torch.Tensor, part: Any = None) -> None:
        parameter.data.copy_(loaded)


def of_vllm(module: str) -> Callable[[Kind], Kind]:
    """The class with the module and the loader's name that vLLM's has."""

    def name(kind: Kind) -> Kind:
        kind.__module__ = f"{LAYERS}.{module}"
        loader = vars(kind)["weight_loader"]
        loader.__module__, loader.__qualname__ = kind.__module__, f"{kind.__name__}.weight_loader"
        return kind

    return name


def narrowed(tensor: torch.Tensor, dim: int, at: int, size: int) -> torch.Tensor:
    return tensor.narrow(dim, at * size, size)


@of_vllm("linear")
class ReplicatedLinear(Layer):
    def weight_loader(self, parameter: Any, loaded: torch.Tensor, part: Any = None) -> None:
        parameter.data.copy_(loaded)


@of_vllm("linear")
class ColumnParallelLinear(Layer):
    def weight_loader(self, parameter: Any, loaded: torch.Tensor, part: Any = None) -> None:
        if parameter.output_dim is not None:
            loaded = narrowed(loaded, 0, self.tp_rank, len(parameter))
        parameter.data.copy_(loaded)


@of_vllm("linear")
class RowParallelLinear(Layer):
    def weight_loader(self, parameter: Any, loaded: torch.Tensor, part: Any = None) -> None:
        if parameter.input_dim is not None:
            loaded = narrowed(loaded, 1, self.tp_rank, parameter.shape[1])
        parameter.data.copy_(loaded)


def into_part(
    parameter: Any, loaded: torch.Tensor, sizes: Sequence[int], part: int, at: int
) -> None:
    """Into one part of a fused tensor, whose parts have these sizes in the unit of its weight."""
    unit = sum(sizes) // len(parameter)
    begin, size = sum(sizes[:part]) // unit, sizes[part] // unit
    parameter.data.narrow(0, begin, size).copy_(narrowed(loaded, 0, at, size))


@of_vllm("linear")
class MergedColumnParallelLinear(Layer):
    def weight_loader(self, parameter: Any, loaded: torch.Tensor, part: Any = None) -> None:
        sizes = [size // self.tp_size for size in self.output_sizes]
        into_part(parameter, loaded, sizes, part, self.tp_rank)


@of_vllm("linear")
class QKVParallelLinear(Layer):
    def weight_loader(self, parameter: Any, loaded: torch.Tensor, part: Any = None) -> None:
        at = self.tp_rank if part == 0 else self.tp_rank // self.num_kv_head_replicas
        into_part(parameter, loaded, self.sizes, part, at)

    @property
    def sizes(self) -> list[int]:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        return [heads * self.head_size, kv_heads * self.head_size, kv_heads * self.v_head_size]


@of_vllm("vocab_parallel_embedding")
class VocabParallelEmbedding(Layer):
    def weight_loader(self, parameter: Any, loaded: torch.Tensor, part: Any = None) -> None:
        rows = self.org_vocab_size_padded // self.tp_size
        begin = min(self.tp_rank * rows, len(loaded))
        own = loaded[begin : begin + rows]
        parameter.data.zero_()
        parameter.data[: len(own)].copy_(own)


@of_vllm("fused_moe.routed_experts")
class RoutedExperts(Layer):
    def weight_loader(self, parameter: Any, loaded: torch.Tensor, part: Any = None) -> None:
        if part == 2:
            parameter.data.copy_(narrowed(loaded, 2, self.tp_rank, parameter.shape[2]))
            return
        half = parameter.shape[1] // 2
        own = narrowed(loaded, 1, self.tp_rank, half)
        parameter.data.narrow(1, part * half, half).copy_(own)


class RMSNorm(nn.Module):
    __module__ = f"{LAYERS}.layernorm"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)


class Attention(nn.Module):
    __module__ = f"{LAYERS}.attention.attention"

    def __init__(self, heads: int = 1) -> None:
        super().__init__()
        self.register_buffer("_k_scale", torch.ones(heads) if heads > 1 else torch.tensor(1.0))


def qkv(rank: int = 0, size: int = 1, *, heads: int = 4, kv_heads: int = 2) -> Any:
    """Without tensors. Heads of queries and keys have eight elements, those of values twelve."""
    return QKVParallelLinear(
        rank,
        size,
        total_num_heads=heads,
        num_heads=heads // size,
        total_num_kv_heads=kv_heads,
        num_kv_heads=max(1, kv_heads // size),
        num_kv_head_replicas=max(1, size // kv_heads),
        head_size=8,
        v_head_size=12,
    )


def vocabulary(rank: int = 0, size: int = 1, *, added: int = 0) -> Any:
    """Of 128 tokens with padding, and more that were added."""
    layer = VocabParallelEmbedding(
        rank, size, org_vocab_size_padded=128, num_embeddings_padded=128 + added
    )
    return layer.add("weight", (128 + added) // size, 16)


def experts(rank: int = 0, size: int = 1, **changes: Any) -> Any:
    """Three of 16 times 24 elements, without tensors. `changes` are of vLLM's configurations."""
    parallel = {"use_ep": False, "dp_size": 1, "pcp_size": 1, "tp_size": size, "tp_rank": rank}
    config = {
        "has_bias": False,
        "is_act_and_mul": True,
        "hidden_dim": 16,
        "hidden_dim_unpadded": 16,
        "intermediate_size_per_partition": 24 // size,
        "intermediate_size_per_partition_unpadded": 24 // size,
    }
    given = {"quant_config": None, **parallel, **config, **changes}
    return RoutedExperts(
        rank,
        size,
        quant_config=given["quant_config"],
        moe_config=SimpleNamespace(
            **{name: given[name] for name in config},
            moe_parallel_config=SimpleNamespace(**{name: given[name] for name in parallel}),
        ),
    )


FP8 = torch.float8_e4m3fn
# of the whole model, as a checkpoint has them: the parts of fused tensors one by one
SHAPES: dict[str, list[tuple[tuple[int, ...], torch.dtype]]] = {
    "embed.weight": [((120, 16), torch.bfloat16)],
    "qkv.weight": [((32, 16), FP8), ((16, 16), FP8), ((24, 16), FP8)],
    "qkv.weight_scale": [((8, 4), torch.float32), ((4, 4), torch.float32), ((6, 4), torch.float32)],
    "qkv.bias": [((32,), torch.bfloat16), ((16,), torch.bfloat16), ((24,), torch.bfloat16)],
    "gate_up.weight": [((48, 16), torch.bfloat16)] * 2,
    "down.weight": [((16, 48), torch.bfloat16)],
    "down.bias": [((16,), torch.bfloat16)],
    "experts.w13_weight": [((3, 24, 16), torch.bfloat16)] * 2,
    "experts.w2_weight": [((3, 16, 24), torch.bfloat16)],
    "router.weight": [((3, 16), torch.bfloat16)],
    "norm.weight": [((16,), torch.float32)],
    "attention._k_scale": [((), torch.float32)],
}
Checkpoint = Mapping[str, Sequence[torch.Tensor]]


def checkpoint(seed: int = 0) -> Checkpoint:
    """The whole model's tensors: random bytes, of which none is a NaN."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: [(torch.rand(shape, generator=random) * 100).to(dtype) for shape, dtype in shapes]
        for name, shapes in SHAPES.items()
    }


class Model(nn.Module):
    """What one rank of a small model holds in vLLM."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        super().__init__()
        halves, bfloat16 = 48 // size, {"dtype": torch.bfloat16}
        fused = sum(qkv(rank, size).sizes)
        none = {"output_dim": None, "input_dim": None}
        self.embed = vocabulary(rank, size).to(torch.bfloat16)
        self.qkv = (
            qkv(rank, size)
            .add("weight", fused, 16, dtype=FP8)
            .add("weight_scale", fused // BLOCK, 4)
            .add("bias", fused, **bfloat16)
        )
        self.attention = Attention()
        gate_up = MergedColumnParallelLinear(rank, size, output_sizes=[48, 48])
        self.gate_up = gate_up.add("weight", 2 * halves, 16, **bfloat16)
        down = RowParallelLinear(rank, size).add("weight", 16, halves, **bfloat16)
        self.down = down.add("bias", 16, input_dim=None, **bfloat16)
        self.router = ReplicatedLinear(rank, size).add("weight", 3, 16, **bfloat16)
        self.experts = (
            experts(rank, size)
            .add("w13_weight", 3, 2 * 24 // size, 16, **none, **bfloat16)
            .add("w2_weight", 3, 16, 24 // size, **none, **bfloat16)
        )
        self.norm = RMSNorm(16)

    def load_weights(self, weights: Checkpoint) -> None:
        """As vLLM's models do: by the loaders of the parameters, where they have one."""
        for name, parts in weights.items():
            tensor: Any = self.get_submodule(name.partition(".")[0])
            tensor = getattr(tensor, name.partition(".")[2])
            for part, loaded in enumerate(parts):
                if hasattr(tensor, "weight_loader"):
                    which = 2 if name.endswith("w2_weight") else part
                    tensor.weight_loader(tensor, loaded.to(tensor.device), which)
                else:
                    tensor.data.copy_(loaded)
