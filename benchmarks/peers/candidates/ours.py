"""`load` of this project, with the options that users have. `variant`: the protocol of the engine.

The service is an etcd. `naive.py` reads from the same source.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.peers.sets import Tensors
from benchmarks.peers.work import Facts, Load, Work
from engine_loader import Destination, load, open_engine, publish
from engine_registry import ModelIdentity, Registry
from engine_registry.etcd.local import LocalEtcd

INSTANCE = "source"


@contextmanager
def service(work: Work) -> Iterator[Facts]:
    with LocalEtcd(host=work.host) as etcd:
        yield {"endpoint": etcd.endpoint}


@contextmanager
def source(work: Work, tensors: Tensors) -> Iterator[Facts]:
    with (
        Registry.connect(work.facts["endpoint"]) as registry,
        open_engine(work.host, work.variant) as engine,
        publish(
            registry,
            engine,
            instance=INSTANCE,
            rank=0,
            world_size=1,
            tensors=tensors,
            model=ModelIdentity("peers"),
        ),
    ):
        yield {}


@contextmanager
def reader(work: Work, tensors: Tensors) -> Iterator[Load]:
    with (
        Registry.connect(work.facts["endpoint"]) as registry,
        open_engine(work.host, work.variant) as engine,
    ):
        destination = Destination(tensors)  # as others register their memory once
        yield Load(lambda: load(registry, engine, INSTANCE, rank=0, tensors=destination))
