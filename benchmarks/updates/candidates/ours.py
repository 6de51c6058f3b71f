"""Snapshots of this project, over `socket`: loads of what has changed, and of everything.

The second is of a publication without deltas and digests, so that neither costs it anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.figures import memory_nbytes
from benchmarks.updates.candidates import DELTA, FULL, Facts, Receiving, Sending, Work
from benchmarks.updates.weights import Tensors
from engine_loader import (
    Destination,
    LoadOptions,
    LoadReport,
    PublishOptions,
    Snapshots,
    load,
    open_engine,
    publish,
)
from engine_registry import InstanceState, InstanceStatus, ModelIdentity, Registry

_PROTOCOL = "socket"
_DELTAS = 4


@contextmanager
def send_delta(work: Work, tensors: Tensors) -> Iterator[Sending]:
    changed = min(1.0, max(Snapshots().changed, 1.2 * work.share))
    options = PublishOptions(snapshots=Snapshots(deltas=_DELTAS, changed=changed))
    with _sending(work, tensors, DELTA, options) as sending:
        yield sending


@contextmanager
def send_full(work: Work, tensors: Tensors) -> Iterator[Sending]:
    with _sending(work, tensors, FULL, PublishOptions(snapshots=2)) as sending:
        yield sending


@contextmanager
def _sending(work: Work, tensors: Tensors, name: str, options: PublishOptions) -> Iterator[Sending]:
    with Registry.connect(work.endpoint) as registry, open_engine(work.host, _PROTOCOL) as engine:
        before = memory_nbytes(os.getpid())
        with publish(
            registry,
            engine,
            instance=name,
            rank=0,
            world_size=1,
            tensors=tensors,
            model=ModelIdentity(name),
            options=options,
        ) as publication:
            facts = {
                "published_nbytes": memory_nbytes(os.getpid()) - before,
                "snapshots_nbytes": publication.snapshots_nbytes,
            }
            yield Sending(facts, lambda _: publication.snapshot(wait=False))


@contextmanager
def receive_delta(work: Work, tensors: Tensors) -> Iterator[Receiving]:
    with _receiving(work, tensors, DELTA) as receiving:
        yield receiving


@contextmanager
def receive_full(work: Work, tensors: Tensors) -> Iterator[Receiving]:
    with _receiving(work, tensors, FULL) as receiving:
        yield receiving


@contextmanager
def _receiving(work: Work, tensors: Tensors, name: str) -> Iterator[Receiving]:
    with _loading(work, tensors, name) as (load, registry), registry.watch(name) as watch:
        events = iter(watch)

        def receive(number: int) -> Facts:
            while not _has(registry.instance(name), number):
                next(events)
            noticed = time.monotonic()
            report = load()
            return {
                "noticed": noticed,
                "nbytes": sum(share.nbytes for share in report.shares),
                "load_s": report.seconds,
                "transfer_s": report.transfer_s,
                "digest_s": report.digest_s,
                "retries": report.retries,
                "verified": report.verified,
            }

        yield Receiving(receive, keeps=name == DELTA)


def _has(status: InstanceStatus, version: int) -> bool:
    return status.state is InstanceState.READY and (status.version or 0) >= version


def wait_for(registry: Registry, name: str, version: int) -> None:
    """Until the instance has that version."""
    with registry.watch(name) as watch:
        for _ in watch:
            if _has(registry.instance(name), version):
                return


@contextmanager
def following(work: Work, tensors: Tensors) -> Iterator[Callable[[], LoadReport]]:
    """Loads of what has changed since the one before."""
    with _loading(work, tensors, DELTA) as (load, _):
        yield load


@contextmanager
def _loading(
    work: Work, tensors: Tensors, name: str
) -> Iterator[tuple[Callable[[], LoadReport], Registry]]:
    with Registry.connect(work.endpoint) as registry, open_engine(work.host, _PROTOCOL) as engine:
        destination = Destination(tensors)
        base: list[str] = []

        def once() -> LoadReport:
            options = LoadOptions(base=base if base and name == DELTA else None)
            report = load(registry, engine, name, rank=0, tensors=destination, options=options)
            base[:] = report.contents
            return report

        yield once, registry
