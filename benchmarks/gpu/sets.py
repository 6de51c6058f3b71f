"""The sets of tensors that are moved, and what is in them: the same on every device, so each
process can make it by itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from math import prod

import torch

from engine_loader.tensors.cuda import wait_for

Tensors = dict[str, torch.Tensor]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
_MIX, _SALT = 0x9E3779B1, 0x85EBCA6B


def large(scale: float) -> Layout:
    """256 tensors of 32 MiB."""
    return {f"large.{number}": (torch.uint8, (32 << 20,)) for number in range(_count(256, scale))}


def mixed(scale: float) -> Layout:
    """The large ones and 2,000 of 8 KiB."""
    return large(scale) | {
        f"little.{number}": (torch.uint8, (8 << 10,)) for number in range(_count(2_000, scale))
    }


def small(scale: float) -> Layout:
    """20,000 tensors of 16 KiB."""
    return {
        f"small.{number}": (torch.uint8, (16 << 10,)) for number in range(_count(20_000, scale))
    }


def llama_70b_rank(scale: float) -> Layout:
    """What rank 0 of tp=8 holds of Llama 3 70B in bf16: slices of the matrices, norms whole.

    `scale` makes the layers fewer.
    """
    hidden, slice_of_ffn, slice_of_vocab = 8192, 28672 // 8, 128256 // 8
    query, key = 64 // 8 * 128, 8 // 8 * 128
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (slice_of_ffn, hidden),
        "mlp.up_proj": (slice_of_ffn, hidden),
        "mlp.down_proj": (hidden, slice_of_ffn),
    }
    ends = {
        "embed_tokens": (slice_of_vocab, hidden),
        "norm": (hidden,),
        "lm_head": (slice_of_vocab, hidden),
    }
    layers = {
        f"layers.{number}.{name}": shape
        for number in range(_count(80, scale))
        for name, shape in layer.items()
    }
    return {
        f"model.{name}.weight": (torch.bfloat16, shape) for name, shape in (layers | ends).items()
    }


SETS: dict[str, Callable[[float], Layout]] = {
    "mixed": mixed,
    "large": large,
    "llama-70b-tp8": llama_70b_rank,
    "small": small,
}


def _count(full: int, scale: float) -> int:
    return max(1, round(full * scale))


def nbytes_of(layout: Layout) -> int:
    return sum(dtype.itemsize * prod(shape) for dtype, shape in layout.values())


def allocate(layout: Layout, device: str, *, pinned: bool = False) -> Tensors:
    """Each in a separate storage, as an engine's weights are."""
    return {
        name: torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
        for name, (dtype, shape) in layout.items()
    }


def filled(layout: Layout, device: str) -> Tensors:
    """With numbers that follow from the tensor's name and the place in it, so that no two tensors
    and no two places are alike.
    """
    # before the temporary ones, which would share segments of torch's allocator with them
    tensors = allocate(layout, device)
    for name, flat in flat_bytes(tensors).items():
        words = torch.arange(flat.numel() // 4, dtype=torch.int64, device=device)
        words.mul_(_MIX).add_(zlib.crc32(name.encode()) * _SALT).bitwise_right_shift_(7)
        flat[: words.numel() * 4].view(torch.int32).copy_(words.to(torch.int32))
        flat[words.numel() * 4 :].fill_(len(name))
    wait_for([torch.device(device)])
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return tensors


def flat_bytes(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor.view(-1).view(torch.uint8) for name, tensor in tensors.items()}
