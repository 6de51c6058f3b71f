"""An instance of two ranks in this process, whose weights can be changed and corrupted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

import torch

from engine_loader import Engine, Publication, Shard, publish
from engine_registry import ModelIdentity, Registry
from tests.support.options import for_publish

Tensors = dict[str, torch.Tensor]
W = TypeVar("W")


class TwoRanks(Generic[W]):
    """Two ranks that hold one model between them. `parts_of` is what a rank has of the weights of
    that name or number, and which box of the whole each tensor is; `weights` are the first ones.
    """

    def __init__(
        self,
        registry: Registry,
        new_engine: Callable[[], Engine],
        name: str,
        parts_of: Callable[[W, int], tuple[Tensors, dict[str, Shard]]],
        weights: W,
        **options: Any,
    ) -> None:
        self._parts_of = parts_of
        self._stack = ExitStack()
        self._parts: list[Tensors] = []
        self._publications: list[Publication] = []
        for rank in range(2):
            parts, boxes = parts_of(weights, rank)
            defaults = {"shards": boxes, "model": ModelIdentity("m"), "ttl_s": 3.0}
            publication = publish(
                registry,
                new_engine(),
                instance=name,
                rank=rank,
                world_size=2,
                tensors=parts,
                **for_publish({**defaults, **options}),
            )
            self._parts.append(parts)
            self._publications.append(self._stack.enter_context(publication))

    def update(self, weights: W) -> None:
        for rank, publication in enumerate(self._publications):
            with publication.update():
                for name, tensor in self._parts_of(weights, rank)[0].items():
                    self._parts[rank][name].copy_(tensor)

    def corrupt(self, name: str) -> None:
        self._parts[1][name].zero_()

    def __enter__(self) -> TwoRanks[W]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()
