"""Naive calls of Mooncake: every address known beforehand, 512 reads in a call, nothing checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.naive import NaiveLoad
from benchmarks.peers.candidates.ours import INSTANCE, service, source
from benchmarks.peers.sets import Tensors
from benchmarks.peers.work import Load, Work
from engine_loader import MooncakeEngine
from engine_registry import Registry

__all__ = ["reader", "service", "source"]


@contextmanager
def reader(work: Work, tensors: Tensors) -> Iterator[Load]:
    with (
        Registry.connect(work.facts["endpoint"]) as registry,
        MooncakeEngine(work.host, work.variant) as engine,
    ):
        yield Load(NaiveLoad(engine, registry, INSTANCE, tensors).run)
