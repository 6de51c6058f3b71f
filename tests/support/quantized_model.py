"""A model with the parameters of an engine: fused projections in fp8, scales, and what
post-processing makes of them, as vLLM does for its kernels.

Before: `weight` row by row and one scale for each of the matrices that are fused. After: one scale,
`weight` as a transposed view, and a bare tensor that hangs on the module.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

FP8 = torch.float8_e4m3fn


class FusedLinear(nn.Module):
    """`sizes` are the rows of the matrices that lie one below another in `weight`."""

    def __init__(self, inputs: int, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.empty(sum(sizes), inputs, dtype=FP8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(len(sizes)), requires_grad=False)

    def process(self) -> None:
        """As a method of quantisation does, once the weights are loaded."""
        scale = self.weight_scale.max()
        parts = [
            (part.float() * (own / scale)).to(FP8)
            for part, own in zip(self.weight.split(self.sizes), self.weight_scale, strict=True)
        ]
        self.weight = nn.Parameter(torch.cat(parts).t(), requires_grad=False)
        self.weight_scale = nn.Parameter(scale.reshape(1).clone(), requires_grad=False)
        self.reciprocal = 1 / scale.reshape(1)  # a bare tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x @ (self.weight.float() * self.weight_scale)
        return result


class Block(nn.Module):
    def __init__(self, hidden: int, key_value: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(hidden, dtype=torch.bfloat16), requires_grad=False)
        self.qkv_proj = FusedLinear(hidden, hidden, key_value, key_value)
        self.o_proj = FusedLinear(hidden, hidden)
        self.gate_up_proj = FusedLinear(hidden, inner, inner)
        self.down_proj = FusedLinear(inner, hidden)
        self.register_buffer("seen", torch.zeros(1), persistent=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.norm.float()
        q = self.qkv_proj(x)[..., : x.shape[-1]]
        x = x + self.o_proj(q)
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        moved: torch.Tensor = x + self.down_proj(torch.tanh(gate) * up)
        return moved


class QuantizedModel(nn.Module):
    """Blocks, and an embedding that is tied to the head."""

    def __init__(self, blocks: int, hidden: int, vocabulary: int = 500) -> None:
        super().__init__()
        self.embed = nn.Parameter(
            torch.empty(vocabulary, hidden, dtype=torch.bfloat16), requires_grad=False
        )
        self.blocks = nn.ModuleList([Block(hidden, hidden // 4, 2 * hidden) for _ in range(blocks)])
        self.head = self.embed

    def read(self, seed: int) -> None:
        """Fills the parameters in place, as from a checkpoint."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in dict(self.named_parameters()).values():
            values = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.copy_(values.abs() + 0.1 if parameter.ndim == 1 else values)

    def process(self) -> None:
        for part in self.modules():
            if isinstance(part, FusedLinear):
                part.process()

    def answer(self) -> str:
        """A digest of what it computes."""
        x = self.embed[:8].float() / self.embed.shape[-1] ** 0.5
        for block in self.blocks:
            x = torch.nn.functional.normalize(block(x), dim=-1)
        logits = x @ self.head.t().float()
        return hashlib.sha256(logits.cpu().numpy().tobytes()).hexdigest()
