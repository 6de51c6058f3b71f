"""Tensors that are filled or published, with what has to be known of their memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from engine_loader.errors import TensorsUnusable, listed
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.regions import describe, devices_of, in_place, moved, places_of
from engine_loader.tensors.shards import Shard, local_parts
from engine_loader.tensors.uses import runs_of
from engine_loader.tensors.writable import check_writable
from engine_registry.errors import InvalidField


class Destination(Mapping[str, torch.Tensor]):
    """Tensors that are filled or published again and again.

    They are inspected once, here, and not at each `load`. A Destination holds on to the tensors,
    and so to their memory. A tensor that takes their place elsewhere, as with `module.weight = …`,
    is not filled.
    """

    @plain_torch()
    def __init__(
        self, tensors: Mapping[str, torch.Tensor], shards: Mapping[str, Shard] | None = None
    ) -> None:
        """Inspects the tensors.

        Args:
            tensors: The tensors, by name.
            shards: Which part of the whole a tensor is, by name.

        Raises:
            TensorsUnusable: Tensors cannot be filled or published as they are.
        """
        self._tensors = dict(tensors)
        self.parts, boxes = local_parts(self._tensors, shards)
        self.manifest = describe(self.parts, boxes)
        self.devices = devices_of(self.parts)
        self.runs = runs_of(self.manifest.tensors)
        self._places = places_of(self._tensors.values())
        # A tensor may be given other memory; what it had stays as long as peers may read it or
        # reads may write to it.
        self._writable = False  # as far as it is known
        self._storages = [part.untyped_storage() for part in self.parts.values()]

    @classmethod
    def of(
        cls, tensors: Mapping[str, torch.Tensor], shards: Mapping[str, Shard] | None
    ) -> Destination:
        """The tensors, which may be a Destination already. InvalidField where it is one, and there
        are shards as well; else TensorsUnusable.
        """
        if not isinstance(tensors, Destination):
            return cls(tensors, shards)
        if shards is not None:
            raise InvalidField(
                "a Destination says which boxes its tensors are",
                "leave `shards` out, or give them to the Destination",
                field="shards",
            )
        return tensors

    @property
    def has_boxes(self) -> bool:
        """Whether every tensor says which part of the whole it is."""
        return not any(entry.opaque for entry in self.manifest.tensors)

    def check_writable(self) -> None:
        """TensorsUnusable names those whose memory is read-only. Looks at it once."""
        if not self._writable:
            check_writable(self.parts, self.manifest)
            self._writable = True

    @plain_torch()
    def check_in_place(self, what: str, remedy: str = "") -> None:
        """TensorsUnusable names each tensor that is not where it was when this was made, after
        `what`.
        """
        if self._places is not None and in_place(self._tensors.values(), self._places):
            return
        if problems := moved(self._tensors, self.manifest):
            raise TensorsUnusable(f"{what}: {listed(problems)}", remedy, problems=problems)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
