"""The tensors that a load of a distributed checkpoint fills, as torch's planner names them. Used by
`EngineReader`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from engine_loader.planning.placed import strides_like
from engine_loader.sources.holdings import Holdings
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.regions import strides_of
from engine_loader.tensors.shards import Shard
from engine_loader.tensors.usable import is_dense
from engine_registry import TensorEntry


@dataclass
class Target:
    """One tensor that is filled, by way of `buffer` if there is one.

    `items` are what the planner calls its parts.
    """

    name: str
    tensor: torch.Tensor
    shard: Shard | None
    items: list[tuple[ReadItem, torch.Tensor]]
    buffer: torch.Tensor | None = None


def targets_of(plan: LoadPlan, planner: LoadPlanner, holdings: Holdings) -> list[Target]:
    """The local tensors whose parts the plan names; where the planner has put something else in
    their place, those.
    """
    parts: defaultdict[tuple[str, tuple[int, ...]], list[tuple[ReadItem, torch.Tensor]]] = (
        defaultdict(list)
    )
    for item in plan.items:
        if item.type is LoadItemType.TENSOR:
            where = item.dest_index.fqn, tuple(item.dest_index.offset or ())
            parts[where].append((item, planner.resolve_tensor(item).detach()))
    targets: list[Target] = []
    for (name, offsets), items in parts.items():
        entry = holdings.tensors[name][0]
        local = _local_tensor(planner, items)
        if local is not None:
            targets.append(_target(name, local, entry, offsets, items))
            continue
        for item, part in items:
            at = tuple(
                start + ahead for start, ahead in zip(offsets, item.dest_offsets, strict=True)
            )
            targets.append(_target(name, part, entry, at, [(item, part)]))
    return targets


def _local_tensor(
    planner: LoadPlanner, items: Sequence[tuple[ReadItem, torch.Tensor]]
) -> torch.Tensor | None:
    """The tensor that all of the items are parts of, and nothing else; None if there is none."""
    look_up = getattr(planner, "lookup_tensor", None)
    if look_up is None:
        return None
    local: torch.Tensor = look_up(items[0][0].dest_index).detach()
    for item, part in items:
        expected = local
        for axis, (start, size) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            expected = expected.narrow(axis, start, size)
        if (part.data_ptr(), part.shape, part.stride()) != (
            expected.data_ptr(),
            expected.shape,
            expected.stride(),
        ):
            return None
    return local if sum(part.numel() for _, part in items) >= local.numel() else None


def _target(
    name: str,
    tensor: torch.Tensor,
    entry: TensorEntry,
    offsets: tuple[int, ...],
    items: list[tuple[ReadItem, torch.Tensor]],
) -> Target:
    shard = None if entry.opaque else Shard(entry.global_shape, offsets or (0,) * tensor.ndim)
    return Target(name, tensor, shard, items, _buffer_for(tensor, entry))


@plain_torch()
def _buffer_for(tensor: torch.Tensor, entry: TensorEntry) -> torch.Tensor | None:
    """Memory in which the tensor lies as at its source; None where it lies so itself."""
    strides = strides_like(entry, tensor.shape)
    if is_dense(tensor) and strides_of(tensor) == strides:
        return None
    if strides is None:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)


def once_each(targets: Sequence[Target]) -> list[list[Target]]:
    """In groups in which no name comes twice; those without a box in groups of their own, as they
    come from one rank only.
    """
    groups: dict[tuple[bool, int], list[Target]] = {}
    seen: defaultdict[str, int] = defaultdict(int)
    for one in targets:
        groups.setdefault((one.shard is None, seen[one.name]), []).append(one)
        seen[one.name] += 1
    return list(groups.values())
