"""The weights of an inference engine with tensor parallelism, as vLLM and SGLang hold them: fused,
with keys and values that several ranks hold where there are more ranks than heads for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from engine_loader import Shard

Tensors = dict[str, torch.Tensor]
HIDDEN, HEAD, Q_HEADS, KV_HEADS, INNER, EXPERTS = 24, 4, 8, 2, 40, 3
Q, KV = Q_HEADS * HEAD, KV_HEADS * HEAD
QKV = Q + 2 * KV


@dataclass(frozen=True)
class Part:
    """What one rank of tp has: of each tensor the whole, some slices, or a box."""

    rank: int
    tp: int

    def tensors(self, version: int = 0) -> tuple[Tensors, dict[str, Shard]]:
        found: Tensors = {}
        shards: dict[str, Shard] = {}
        for name, whole in wholes(version).items():
            slices = self._slices(name)
            part = whole
            for dim, some in slices.items():
                part = torch.cat([part.narrow(dim, low, high - low) for low, high in some], dim)
            found[name] = turned(part) if name.endswith("fp8") else part.contiguous()
            shards[name] = Shard(tuple(whole.shape), (0,) * whole.ndim, slices)
        return found, shards

    def _slices(self, name: str) -> Mapping[int, Sequence[tuple[int, int]]]:
        q = self._of(0, Q)
        head = self.rank * KV_HEADS // self.tp * HEAD if self.tp > KV_HEADS else None
        k, v = (
            self._of(start, KV) if head is None else (start + head, start + head + HEAD)
            for start in (Q, Q + KV)
        )
        gate, up = self._of(0, INNER), self._of(INNER, INNER)
        return {
            "qkv_proj.weight": {0: [q, k, v]},
            "qkv_proj.bias": {0: [q, k, v]},
            "qkv_proj.weight_fp8": {1: [q, k, v]},
            "gate_up_proj.weight": {0: [gate, up]},
            "experts.w13": {1: [gate, up]},
            "o_proj.weight": {1: [q]},
            "norm.weight": {},
        }[name]

    def _of(self, start: int, size: int) -> tuple[int, int]:
        return start + size * self.rank // self.tp, start + size * (self.rank + 1) // self.tp


@dataclass(frozen=True)
class Rows:
    """What one of several ranks has that know nothing of heads: plain rows of each tensor."""

    rank: int
    ranks: int

    def tensors(self, version: int = 0) -> tuple[Tensors, dict[str, Shard]]:
        found, shards = {}, {}
        for name, whole in wholes(version).items():
            low, high = (len(whole) * at // self.ranks for at in (self.rank, self.rank + 1))
            part = whole[low:high]
            found[name] = turned(part) if name.endswith("fp8") else part.clone()
            shards[name] = Shard(tuple(whole.shape), (low, *[0] * (whole.ndim - 1)))
        return found, shards


def ranks_of(layout: str) -> list[Part | Rows]:
    """`tp-2` and `rows-3` are layouts."""
    kind, _, count = layout.partition("-")
    ranks = range(int(count))
    if kind == "rows":
        return [Rows(rank, len(ranks)) for rank in ranks]
    return [Part(rank, len(ranks)) for rank in ranks]


def wholes(version: int = 0) -> Tensors:
    random = torch.Generator().manual_seed(version)

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=random)

    return {
        "qkv_proj.weight": some(QKV, HIDDEN).bfloat16(),
        "qkv_proj.bias": some(QKV),
        "qkv_proj.weight_fp8": some(HIDDEN, QKV).to(torch.float8_e4m3fn),
        "gate_up_proj.weight": some(2 * INNER, HIDDEN).bfloat16(),
        "experts.w13": some(EXPERTS, 2 * INNER, HIDDEN).half(),
        "o_proj.weight": some(HIDDEN, Q),
        "norm.weight": some(HIDDEN),
    }


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, but in memory column by column, as kernels for fp8 want them."""
    return tensor.t().contiguous().t()


def different(found: Tensors, wanted: Tensors) -> list[str]:
    """The names of the tensors that differ in a byte."""
    return [
        name
        for name, tensor in wanted.items()
        if not torch.equal(
            found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
        )
    ]
