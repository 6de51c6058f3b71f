"""Tensors of the caller, also on the meta device, that are to lie in other memory: what they are,
and how they get there while they stay the same objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from engine_loader.tensors.meta import fixed, like
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.regions import entry_of
from engine_loader.tensors.shards import Shard, is_sharded, local_parts
from engine_loader.tensors.usable import refuse_unusable, unusable, unusable_name
from engine_registry.schema.manifest import TensorEntry

_META_STEP = 1 << 48  # between the addresses that storages without memory are given


class Wanted:
    """The caller's tensors. They are looked at once, here, and changed by `put` alone."""

    @plain_torch()
    def __init__(
        self, tensors: Mapping[str, torch.Tensor], shards: Mapping[str, Shard] | None
    ) -> None:
        """TensorsUnusable names those that cannot be made views of other memory."""
        self.tensors = dict(tensors)
        self.parts, boxes = local_parts(self.tensors, shards)
        self.entries = _described(self.tensors, self.parts, boxes)
        self._made: dict[int, torch.Tensor] = {}

    @property
    def devices(self) -> set[torch.device]:
        """Those of tensors that have memory."""
        return {part.device for part in self.parts.values() if part.numel() and not part.is_meta}

    def elsewhere(self, devices: Mapping[str, torch.device]) -> list[str]:
        """One line for each tensor that has memory on another device than what is held."""
        return [
            f"{name}: on {device} held, on {part.device} here"
            for name, device in devices.items()
            if (part := self.parts[name]).numel() and not part.is_meta and part.device != device
        ]

    @plain_torch()
    def prepare(self, views: Mapping[str, torch.Tensor]) -> None:
        """Makes what takes the place of tensors on the meta device, so that `put` cannot fail.

        TensorsUnusable names those whose place cannot be taken.
        """
        problems = []
        self._made.clear()  # of another rank's memory, which could not be adopted
        for name, view in views.items():
            tensor: Any = self.tensors[name]
            if not tensor.is_meta or id(tensor) in self._made:
                continue
            try:
                made = like(tensor, view)
            except Exception as exc:  # noqa: BLE001  a subclass may raise whatever it likes
                problems.append(f"{name}: no {type(tensor).__name__} can be made of memory ({exc})")
                continue
            self._made[id(tensor)] = made
        refuse_unusable(problems)

    @plain_torch()
    def put(self, views: Mapping[str, torch.Tensor]) -> None:
        """Makes each tensor a view. Prepared ones stay the same objects, too."""
        for name, view in views.items():
            tensor: Any = self.tensors[name]
            if (made := self._made.pop(id(tensor), None)) is not None:
                torch.utils.swap_tensors(tensor, made)
            elif is_sharded(tensor):
                tensor._local_tensor.data = view
            elif tensor.numel() and tensor.data_ptr() != view.data_ptr():
                tensor.data = view


def _unfit(tensor: Any) -> str:
    if is_lazy(tensor):
        return "is not initialized and has no shape yet: run its module once"
    why = fixed(tensor)
    return f"is on the meta device, and {why}" if why else ""


def _described(
    tensors: Mapping[str, torch.Tensor],
    parts: Mapping[str, torch.Tensor],
    boxes: Mapping[str, Shard],
) -> tuple[TensorEntry, ...]:
    """With addresses that say which of them share memory, also of those that have none."""
    storages: dict[int, int] = {}
    entries, problems = [], []
    for name, part in parts.items():
        whole: Any = tensors[name]
        is_meta = isinstance(whole, torch.Tensor) and whole.is_meta
        problem = unusable_name(name) or (_unfit(whole) if is_meta else unusable(part))
        if problem:
            problems.append(f"{name}: {problem}")
            continue
        addr = part.data_ptr() if part.numel() else 0
        if is_meta and part.numel():
            number = storages.setdefault(part.untyped_storage()._cdata, len(storages) + 1)
            addr = _META_STEP * number + int(part.storage_offset()) * part.itemsize
        try:
            entries.append(entry_of(name, part, addr, boxes.get(name)))
        except ValueError as exc:
            problems.append(f"{name}: {exc}")
    refuse_unusable(problems)
    return tuple(entries)
