"""What a test offers, and loads of it. All ends with the test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch

from engine_loader import Engine, LoadReport, Publication, load, publish
from engine_registry import ModelIdentity, Registry
from engine_registry.watching.waiting import Wanted
from tests.support.options import for_load, for_publish

MODEL = ModelIdentity("m")
Tensors = dict[str, torch.Tensor]


def copy_of(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


class Offers:
    def __init__(
        self, registry: Registry, new_engine: Callable[[], Engine], stack: ExitStack
    ) -> None:
        self.registry = registry
        self.new_engine = new_engine
        self._stack = stack

    def __call__(
        self, tensors: Tensors, instance: str = "a", engine: Engine | None = None, **fields: object
    ) -> Publication:
        given = {
            "instance": instance,
            "rank": 0,
            "world_size": 1,
            "model": MODEL,
            "digests": True,
            **fields,
        }
        engine = engine or self.new_engine()
        return self._stack.enter_context(
            publish(self.registry, engine, tensors=tensors, **for_publish(given))
        )

    def load(
        self,
        tensors: Tensors,
        engine: Engine | None = None,
        source: Wanted = "a",
        **fields: object,
    ) -> LoadReport:
        given = {"rank": 0, "reuse": True, **fields}
        engine = engine or self.new_engine()
        report: LoadReport = load(self.registry, engine, source, tensors=tensors, **for_load(given))
        return report
