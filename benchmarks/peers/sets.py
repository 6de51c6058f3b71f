"""The sets of tensors that are moved, and what is in them: the same in every process, which makes
it by itself.

Tensors are numbered and have bytes. Each has a storage, but those of a set that is `joined` lie
side by side in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
_BLOCK_NBYTES = 1 << 20
_BLOCK = np.random.default_rng(7).integers(0, 1 << 63, _BLOCK_NBYTES // 8, dtype=np.uint64)
_ODD = 0x9E3779B97F4A7C15
_POISON = 0xA5


@dataclass(frozen=True)
class TensorSet:
    """`sizes`: of each tensor, in bytes."""

    sizes: Sequence[int]
    joined: bool = False

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)

    def allocate(self) -> Tensors:
        """Memory that has been written to, so that no load pays for its first use."""
        if self.joined:
            block = torch.full((self.nbytes,), _POISON, dtype=torch.uint8)
            return {f"t{at}": part for at, part in enumerate(block.split(list(self.sizes)))}
        return {
            f"t{at}": torch.full((nbytes,), _POISON, dtype=torch.uint8)
            for at, nbytes in enumerate(self.sizes)
        }

    def filled(self) -> Tensors:
        tensors = self.allocate()
        for at, tensor in enumerate(tensors.values()):
            for into, part in _content(at, tensor):
                into[:] = part
        return tensors


def wrong(tensors: Tensors) -> list[str]:
    """The tensors that do not hold what a filled set does; every byte is compared."""
    return [
        name
        for at, (name, tensor) in enumerate(tensors.items())
        if not all(np.array_equal(here, part) for here, part in _content(at, tensor))
    ]


def poison(tensors: Tensors) -> None:
    for tensor in tensors.values():
        tensor.fill_(_POISON)


def views(tensors: Tensors) -> list[memoryview]:
    """The memory of each tensor."""
    return [tensor.numpy().data for tensor in tensors.values()]


def storages(tensors: Tensors) -> list[tuple[int, int]]:
    """Address and bytes of each storage, of which joined tensors have one together."""
    found = (tensor.untyped_storage() for tensor in tensors.values())
    return list({storage.data_ptr(): storage.nbytes() for storage in found}.items())


def flat(tensors: Tensors) -> torch.Tensor:
    """A copy of all of them in one block."""
    return torch.cat(list(tensors.values()))


def spread(block: torch.Tensor, tensors: Tensors) -> None:
    """Copies such a block into them."""
    parts = block.split([tensor.nbytes for tensor in tensors.values()])
    for tensor, part in zip(tensors.values(), parts, strict=True):
        tensor.copy_(part)


def _content(at: int, tensor: torch.Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parts of the tensor `at` in the set, and what each holds. No two parts are alike."""
    array = tensor.numpy()
    for number, start in enumerate(range(0, array.size, _BLOCK_NBYTES)):
        here = array[start : start + _BLOCK_NBYTES]
        words = -(-here.size // 8)
        salt = np.uint64(((at << 24) + number) * _ODD % (1 << 64))
        yield here, (_BLOCK[:words] + salt).view(np.uint8)[: here.size]
