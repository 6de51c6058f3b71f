"""Which part of the whole a tensor is: a shard that is stated, or a DTensor that says it itself."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch

from engine_loader.errors import TensorsUnusable
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.usable import refuse_unusable
from engine_registry.errors import InvalidField
from engine_registry.schema.numbers import whole
from engine_registry.schema.printable import short


@dataclass(frozen=True)
class Shard:
    """Which box of the whole tensor a rank's tensor is. The box has the shape of the rank's tensor.

    Attributes:
        global_shape: The shape of the whole tensor, in elements.
        offsets: Where the box begins in the whole, in elements along each dimension.

    Raises:
        TensorsUnusable: A field is no sequence of whole numbers.

    Example:
        `Shard((8, 16), (4, 0))` is the lower half, for a tensor of shape (4, 16).
    """

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        """Takes any sequences of whole numbers. Raises TensorsUnusable."""
        for field in ("global_shape", "offsets"):
            object.__setattr__(self, field, _whole_numbers(field, getattr(self, field)))


def _whole_numbers(field: str, values: Any) -> tuple[int, ...]:
    try:
        if isinstance(values, Set | Mapping):
            raise TypeError("it has no order")
        return tuple([whole(field, value, -sys.maxsize) for value in values])
    except (TypeError, InvalidField) as exc:
        raise TensorsUnusable(
            f"{field} {short(repr(values))} of a shard is not valid: it has a whole number "
            "for each dimension",
            field=field,
        ) from exc


def is_sharded(tensor: object) -> bool:
    """It says itself which part of the whole it is: a DTensor."""
    return hasattr(tensor, "__create_chunk_list__") and hasattr(tensor, "to_local")


@plain_torch()
def local_parts(
    tensors: Mapping[str, torch.Tensor], shards: Mapping[str, Shard] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Shard]]:
    """What this process holds of each tensor, and which box of the whole that is, as far as it is
    known.

    A DTensor on a device mesh that this process is not in is left out: it holds nothing of it.
    Raises TensorsUnusable for a DTensor that is a partial sum, or whose part is no box, and for one
    that has a shard stated besides.
    """
    parts, boxes, problems = dict(tensors), dict(shards or {}), []
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            parts[name] = _arrived(tensor)
            continue
        dtensor: Any = tensor
        problem = _no_box(dtensor)
        if not problem and name in boxes:
            problem = "has a shard stated, but is a DTensor, which says itself which part it is"
        if problem:
            problems.append(f"{name}: {problem}")
        elif dtensor.device_mesh.get_coordinate() is None:
            del parts[name]
        else:
            parts[name] = _arrived(dtensor.detach().to_local())
            (chunk,) = dtensor.__create_chunk_list__()
            boxes[name] = Shard(tuple(dtensor.shape), tuple(chunk.offsets))
    refuse_unusable(problems)
    return parts, boxes


def local(tensor: Any) -> Any:
    """What this process holds of the tensor."""
    return _arrived(tensor.to_local() if is_sharded(tensor) else tensor)


def _arrived(tensor: Any) -> Any:
    """The tensor that a collective fills, once it is filled: an AsyncCollectiveTensor wraps it."""
    return tensor.wait() if hasattr(tensor, "trigger_wait") else tensor


def _no_box(dtensor: Any) -> str:
    """Why this process's part of it is no box of the whole.

    A dimension that is split several times is split from left to right, in ever smaller runs; a
    strided placement says that it comes after so many later parts, as data parallelism does on top
    of tensor parallelism. With any other stride there are gaps.
    """
    if any(placement.is_partial() for placement in dtensor.placements):
        return "is a partial sum over its device mesh: call .redistribute() first"
    for axis, placement in enumerate(dtensor.placements):
        stride = getattr(placement, "split_factor", 1)
        sizes = list(zip(dtensor.placements, dtensor.device_mesh.shape, strict=True))[axis + 1 :]
        if stride > 1 and stride != math.prod(
            size for later, size in sizes if later.is_shard(placement.dim)
        ):
            return f"is split with gaps ({placement}): call .redistribute() first"
    return ""
