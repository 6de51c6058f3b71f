"""The weights, and the steps that change them: the same in every process, which makes them by
itself.
"""

from __future__ import annotations

import math

import torch

Tensors = dict[str, torch.Tensor]
_LAYERS = 22
# Of a layer, in multiples of the model's width.
_MATRICES = {
    "q": (1.0, 1.0),
    "k": (0.25, 1.0),
    "v": (0.25, 1.0),
    "o": (1.0, 1.0),
    "gate": (3.5, 1.0),
    "up": (3.5, 1.0),
    "down": (1.0, 3.5),
}
_EMBEDDED = 4.0
_ODD = 0x9E3779B1


def weights(gib: float) -> Tensors:
    """Matrices and norms of bf16, 200 tensors."""
    squares = _LAYERS * sum(high * wide for high, wide in _MATRICES.values()) + _EMBEDDED
    width = max(8, int(math.sqrt(gib * (1 << 30) / (2 * squares))) // 8 * 8)
    shapes: dict[str, tuple[int, ...]] = {"embed": (int(_EMBEDDED * width), width)}
    for layer in range(_LAYERS):
        for name, (high, wide) in _MATRICES.items():
            shapes[f"layer.{layer}.{name}"] = int(high * width), int(wide * width)
        for name in ("norm", "norm2"):
            shapes[f"layer.{layer}.{name}"] = (width,)
    shapes["norm"] = (width,)
    generator = torch.Generator().manual_seed(7)
    return {
        name: (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        for name, shape in shapes.items()
    }


def step(tensors: Tensors, number: int, share: float) -> None:
    """Moves that share of the elements, at random places, up or down by the least that bf16 has,
    as a small step of an optimizer does.
    """
    generator = torch.Generator().manual_seed(number)
    for tensor in tensors.values():
        flat = tensor.view(-1).view(torch.int16)
        # some places come twice, so that many give the share that is wanted
        count = max(1, round(-math.log1p(-share) * flat.numel()))
        places = torch.randint(flat.numel(), (count,), generator=generator)
        up = ((places ^ (number * _ODD)) >> 3) & 1
        flat[places] = flat[places] + (2 * up - 1).to(torch.int16)


def poison(tensors: Tensors) -> None:
    for tensor in tensors.values():
        tensor.view(torch.int16).fill_(-1)


def wrong(tensors: Tensors, expected: Tensors) -> int:
    """How many tensors differ; every byte is compared."""
    return sum(
        not torch.equal(tensors[name].view(torch.int16), one.view(torch.int16))
        for name, one in expected.items()
    )


def nbytes_of(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def copied(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}
