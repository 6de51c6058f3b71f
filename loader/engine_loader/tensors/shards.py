"""Which part of the whole a tensor is: a shard that is stated, or a DTensor that says it itself."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch

from engine_loader.errors import TensorsUnusable
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.usable import refuse_unusable
from engine_registry.errors import InvalidField
from engine_registry.schema.manifest import Slices, TensorEntry
from engine_registry.schema.numbers import whole
from engine_registry.schema.printable import short


@dataclass(frozen=True)
class Shard:
    """Which part of the whole tensor a rank's tensor is: one box, or several that lie in the rank's
    tensor one after another.

    Attributes:
        global_shape: The shape of the whole tensor, in elements.
        offsets: Where the box begins in the whole, in elements along each dimension. A box has the
            shape of the rank's tensor. 0 along dimensions in `slices`.
        slices: By dimension, the (start, stop) of each slice of the whole that the tensor has along
            it, in the order in which the tensor has them.

    Raises:
        TensorsUnusable: A field is no sequence of whole numbers, or `slices` is no mapping from
            dimensions to pairs.

    Example:
        `Shard((8, 16), (4, 0))` is the lower half, for a tensor of shape (4, 16).
        `Shard((12, 8), (0, 0), {0: [(0, 4), (8, 9), (10, 11)]})` is a fused tensor of shape (6, 8):
        four rows of queries, one of keys and one of values.
    """

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    slices: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Takes any sequences of whole numbers. Raises TensorsUnusable."""
        for name in ("global_shape", "offsets"):
            object.__setattr__(self, name, _whole_numbers(name, getattr(self, name)))
        object.__setattr__(self, "slices", _checked_slices(self.slices))


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


def _checked_slices(value: Any) -> dict[int, tuple[tuple[int, int], ...]]:
    try:
        if not isinstance(value, Mapping):
            raise TypeError("it is no mapping")
        return {
            whole("slices", dim, 0): tuple([_pair(*pair) for pair in pairs])
            for dim, pairs in value.items()
        }
    except (TypeError, InvalidField) as exc:
        raise TensorsUnusable(
            f"slices {short(repr(value))} of a shard are not valid: they are a list of "
            "(start, stop) for a dimension",
            field="slices",
        ) from exc


def _pair(start: Any, stop: Any) -> tuple[int, int]:
    return whole("slices", start, 0), whole("slices", stop, start)


def shard_of(entry: TensorEntry) -> Shard:
    """What the manifest says of a tensor that is not opaque."""
    if entry.slices is None:
        return Shard(entry.global_shape, entry.offsets)
    return Shard(entry.global_shape, (0,) * len(entry.shape), dict(enumerate(entry.slices)))


def placed_in(shape: tuple[int, ...], shard: Shard) -> tuple[tuple[int, ...], Slices | None]:
    """Where a tensor of that shape begins in the whole, and its slices, unless it is one box.

    ValueError says why the shard is not one of such a tensor.
    """
    if not len(shape) == len(shard.global_shape) == len(shard.offsets):
        raise ValueError(f"shard {shard} does not have the {len(shape)} dimensions of the tensor")
    if strange := [dim for dim in shard.slices if dim >= len(shape)]:
        raise ValueError(f"the shard has slices along dimension {strange[0]}, the tensor has not")
    along = tuple([_along(dim, shape, shard) for dim in range(len(shape))])
    offsets = tuple([some[0][0] for some in along])
    one_box = all(len(some) == 1 for some in along) or 0 in shape
    return offsets, None if one_box else along


def _along(dim: int, shape: tuple[int, ...], shard: Shard) -> tuple[tuple[int, int], ...]:
    """The slices along one dimension; ValueError where they are not in the whole."""
    limit, offset, some = shard.global_shape[dim], shard.offsets[dim], shard.slices.get(dim)
    size = shape[dim]
    if some is None:
        if not 0 <= offset <= limit - size:
            raise ValueError(
                f"shard at {list(shard.offsets)} of shape {list(shape)} does not fit into "
                f"{list(shard.global_shape)}"
            )
        return ((offset, offset + size),)
    if offset:
        raise ValueError(f"shard has slices along dimension {dim}, but begins at {offset}: say 0")
    if any(stop > limit for _, stop in some):
        raise ValueError(f"slices {list(some)} do not lie in {limit} along dimension {dim}")
    if (held := sum([stop - start for start, stop in some])) != size:
        raise ValueError(
            f"slices {list(some)} have {held} elements along dimension {dim}, the tensor has {size}"
        )
    return _joined(some)


def _joined(slices: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbours as one, without those that are empty: so that equal parts are stated equally."""
    joined: list[tuple[int, int]] = []
    for start, stop in slices:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        elif start != stop:
            joined.append((start, stop))
    return tuple(joined) or ((0, 0),)


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


def all_in_boxes(
    tensors: Mapping[str, torch.Tensor], shards: Mapping[str, Shard] | None = None
) -> bool:
    """Whether it is known of each tensor which box of the whole this process has of it. They need
    no memory. Raises TensorsUnusable as `local_parts` does.
    """
    parts, boxes = local_parts(tensors, shards)
    return parts.keys() <= boxes.keys()


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
