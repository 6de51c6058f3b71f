"""Which part of the whole model each tensor of a rank is, as vLLM's own layers cut it: so that
ranks of one parallel layout can be filled from another.

A layer cuts the checkpoint's tensors in the `weight_loader` of its parameters. A tensor is placed
only by the loader that it has, if that is one of those whose cut is known here. This takes vLLM's
objects and imports nothing of vLLM. Pure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import nn

from engine_loader.tensors.shards import Shard

_LAYERS = "vllm.model_executor.layers."
# layers that hold their tensors as a whole, in every layout
_WHOLE = {
    f"{_LAYERS}layernorm": {"RMSNorm", "GemmaRMSNorm", "LayerNorm"},
    f"{_LAYERS}conv": {"Conv2dLayer", "Conv3dLayer"},
    "torch.nn.modules.conv": {"Conv1d", "Conv2d", "Conv3d"},
    "torch.nn.modules.linear": {"Linear"},
    "torch.nn.modules.normalization": {"LayerNorm", "RMSNorm"},
    "torch.nn.modules.sparse": {"Embedding"},
}
# layers whose tensors of one element are scales of the KV cache, the same in every rank
_SCALES = {
    f"{_LAYERS}attention.attention": {"Attention"},
    f"{_LAYERS}attention.mla_attention": {"MLAAttention"},
}
# marks of parameters that their loader cuts in other ways
_STRANGE = ("is_sharded_weight", "is_transposed", "marlin_tile_size", "needs_scalar_to_array")
# of a fused tensor: the size of a part in the whole model, and in a rank, and which of the ranks'
Part = tuple[int, int, int]


class Layout:
    """The parts that the tensors of a model are, as far as vLLM's layers say it.

    Attributes:
        shards: Which part of the whole a tensor is, by name.
        unknown: The names of the other tensors.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Looks at vLLM's layers.

        Args:
            module: The model, before its weights are post-processed. It needs no memory yet.
            tensors: Those tensors of it that are filled and served, by their names in it.
        """
        self.shards: dict[str, Shard] = {}
        self.unknown: list[str] = []
        self._cut: dict[str, Any] = {}  # those whose parts are known by their loaders
        for name, tensor in tensors.items():
            cut = _cut_of(module, name, tensor)
            if cut is None:
                self.unknown.append(name)
                continue
            self.shards[name] = cut.shard
            if cut.by_loader:
                self._cut[name] = tensor

    @contextmanager
    def checked(self) -> Iterator[list[str]]:
        """vLLM reads its checkpoint inside. Gives a list that afterwards has the names of the
        tensors that are cut, but that the model has not filled by their loaders. Their parts are
        not known, as the model may have cut them differently.
        """
        loaders = {name: tensor.weight_loader for name, tensor in self._cut.items()}
        missed = dict.fromkeys(self._cut)

        def noting(name: str, loader: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(loader)
            def load(*args: Any, **kwargs: Any) -> Any:
                missed.pop(name, None)
                return loader(*args, **kwargs)

            return load

        names: list[str] = []
        for name, loader in loaders.items():
            self._cut[name].weight_loader = noting(name, loader)
        try:
            yield names
        finally:
            for name, loader in loaders.items():
                self._cut[name].weight_loader = loader
            names += missed


class _Cut(NamedTuple):
    """`by_loader`: the tensor's loader decides which part it is, also where that is the whole."""

    shard: Shard
    by_loader: bool


def _cut_of(module: nn.Module, name: str, tensor: torch.Tensor) -> _Cut | None:
    path, _, leaf = name.rpartition(".")
    try:
        owner: Any = module.get_submodule(path)
    except AttributeError:
        return None
    is_view = getattr(owner, leaf, None) is not tensor
    if is_view or any(getattr(tensor, at, 0) for at in _STRANGE):
        return None
    loader = getattr(tensor, "weight_loader", None)
    if loader is None:
        is_scale = tensor.numel() == 1 and _is_one_of(owner, _SCALES)
        is_whole = is_scale or _is_one_of(owner, _WHOLE)
        return _Cut(_whole(tensor), False) if is_whole else None
    kind = _kind(loader, owner)
    if kind == "ReplicatedLinear.weight_loader":
        return _Cut(_whole(tensor), False)
    shard = _CUTS[kind](owner, leaf, tensor) if kind in _CUTS else None
    return _Cut(shard, tensor.numel() > 1) if shard is not None else None


def _kind(loader: Any, owner: object) -> str:
    """The name of the method, where it is one of the owner that a layer of vLLM defines."""
    function: Any = getattr(loader, "__func__", None)
    is_layers = str(getattr(function, "__module__", "")).startswith(_LAYERS)
    if not is_layers or loader.__self__ is not owner:
        return ""
    return str(function.__qualname__).removesuffix("_v2")


def _is_one_of(owner: object, known: Mapping[str, set[str]]) -> bool:
    return type(owner).__name__ in known.get(type(owner).__module__, ())


def _whole(tensor: torch.Tensor) -> Shard:
    return Shard(tuple(tensor.shape), (0,) * tensor.dim())


def _column(owner: Any, leaf: str, tensor: torch.Tensor) -> Shard | None:
    return _even(owner, tensor, getattr(tensor, "output_dim", None))


def _row(owner: Any, leaf: str, tensor: torch.Tensor) -> Shard | None:
    return _even(owner, tensor, getattr(tensor, "input_dim", None))


def _even(owner: Any, tensor: torch.Tensor, dim: int | None) -> Shard | None:
    if dim is None:
        return _whole(tensor)
    return _fused(tensor, dim, [_share(tensor.shape[dim], owner.tp_rank, owner.tp_size)])


def _share(size: int, rank: int, ranks: int) -> Part:
    return size * ranks, size, rank


def _merged(owner: Any, leaf: str, tensor: torch.Tensor) -> Shard | None:
    """Such as the gate and the up projection."""
    parts = [(size, size // owner.tp_size, owner.tp_rank) for size in owner.output_sizes]
    return _fused(tensor, getattr(tensor, "output_dim", None), parts)


def _qkv(owner: Any, leaf: str, tensor: torch.Tensor) -> Shard | None:
    """Queries, keys and values; several ranks may have the same keys and values."""
    k_size, v_size = owner.head_size, owner.v_head_size
    kv_rank = owner.tp_rank // owner.num_kv_head_replicas
    parts = [
        (owner.total_num_heads * k_size, owner.num_heads * k_size, owner.tp_rank),
        (owner.total_num_kv_heads * k_size, owner.num_kv_heads * k_size, kv_rank),
        (owner.total_num_kv_heads * v_size, owner.num_kv_heads * v_size, kv_rank),
    ]
    return _fused(tensor, getattr(tensor, "output_dim", None), parts)


def _vocabulary(owner: Any, leaf: str, tensor: torch.Tensor) -> Shard | None:
    """The model's tokens and those that were added, each with zeros for padding after them."""
    base, size, rank = owner.org_vocab_size_padded, owner.tp_size, owner.tp_rank
    added = owner.num_embeddings_padded - base
    parts = [(rows, rows // size, rank) for rows in (base, added) if rows]
    return _fused(tensor, getattr(tensor, "output_dim", None), parts)


def _experts(owner: Any, leaf: str, tensor: torch.Tensor) -> Shard | None:
    """Those that every rank has a part of, as the checkpoint has them."""
    config = owner.moe_config
    parallel = config.moe_parallel_config
    is_plain = (
        owner.quant_config is None
        and not config.has_bias
        and config.is_act_and_mul
        and config.hidden_dim == config.hidden_dim_unpadded
        and config.intermediate_size_per_partition
        == config.intermediate_size_per_partition_unpadded
    )
    if not is_plain or parallel.use_ep or parallel.dp_size > 1 or parallel.pcp_size > 1:
        return None
    ranks, rank = parallel.tp_size, parallel.tp_rank
    if leaf == "w13_weight":
        return _fused(tensor, 1, [_share(tensor.shape[1] // 2, rank, ranks)] * 2)
    if leaf == "w2_weight":
        return _fused(tensor, 2, [_share(tensor.shape[2], rank, ranks)])
    return None


def _fused(tensor: torch.Tensor, dim: int | None, parts: Sequence[Part]) -> Shard | None:
    """A tensor that is cut along a dimension, and has these parts one after another. None where
    they do not fill it. An element may stand for several: a packed one, or the scale of a block.
    """
    if dim is None or not tensor.shape[dim]:
        return _whole(tensor)
    unit = Fraction(sum([size for _, size, _ in parts]), tensor.shape[dim])
    slices: list[tuple[Fraction, Fraction]] = []
    before = 0
    for whole, size, which in parts:
        slices.append(((before + size * which) / unit, (before + size * (which + 1)) / unit))
        before += whole
    ends = [before / unit, *[end for some in slices for end in some]]
    if any(number.denominator != 1 for number in [unit, *ends]):
        return None
    shape = list(tensor.shape)
    shape[dim] = int(ends[0])
    cut = [(int(start), int(stop)) for start, stop in slices]
    return Shard(tuple(shape), (0,) * tensor.dim(), {dim: cut})


_CUTS: dict[str, Callable[[Any, str, torch.Tensor], Shard | None]] = {
    "ColumnParallelLinear.weight_loader": _column,
    "RowParallelLinear.weight_loader": _row,
    "MergedColumnParallelLinear.weight_loader": _merged,
    "QKVParallelLinear.weight_loader": _qkv,
    "VocabParallelEmbedding.weight_loader": _vocabulary,
    "RoutedExperts.weight_loader": _experts,
}
