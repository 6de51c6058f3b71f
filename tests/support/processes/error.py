"""A program that an error of ours ends: `python -m tests.support.processes.error NAME ENDING
SOURCE_PID`.

It has a registry and an engine, brings the error about in real surroundings, and catches nothing.
It closes what it has opened if ENDING is `closing`; if it is `leaving`, that is left to the end of
the process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine_loader import MooncakeEngine, Pace, Progress, Publication, load, publish
from engine_registry import ModelIdentity, Registry
from engine_registry.etcd.local import LocalEtcd
from tests.support.hostile_peer import HostilePeer, Impostor, drips
from tests.support.options import for_load, for_publish
from tests.support.processes.source import empty
from tests.support.registry import connect
from tests.support.signals import signal_and_wait
from tests.support.waiting import wait_until

NBYTES = 8 << 20
SOURCE = "source"  # a `source` in another process
PACE = Pace(256 << 10, 2, stall_s=0.3, patience_s=1.0)
Tensors = dict[str, torch.Tensor]


@dataclass
class Rank:
    stack: ExitStack
    registry: Registry
    engine: MooncakeEngine
    source_pid: int

    def load(self, source: str = SOURCE, *, tensors: Tensors | None = None, **options: Any) -> None:
        wanted = empty(NBYTES) if tensors is None else tensors
        load(
            self.registry,
            self.engine,
            source,
            rank=0,
            tensors=wanted,
            **for_load({"timeout_s": 2.0, "pace": PACE, **options}),
        )

    def load_and_at_half(self, act: Callable[[], object], **options: Any) -> None:
        done = threading.Event()

        def progress(now: Progress) -> None:
            if not done.is_set() and now.nbytes * 2 >= now.total_nbytes:
                done.set()
                act()

        self.load(progress=progress, **options)

    def publish(
        self, instance: str, tensors: Tensors, engine: MooncakeEngine | None = None, **options: Any
    ) -> Publication:
        identity: dict[str, Any] = {
            "instance": instance,
            "rank": 0,
            "world_size": 1,
            "model": ModelIdentity("m"),
        }
        return self.stack.enter_context(
            publish(
                self.registry,
                engine or self.engine,
                tensors=tensors,
                **for_publish({**identity, **options}),
            )
        )

    def signal(self, number: signal.Signals) -> None:
        signal_and_wait(self.source_pid, number)

    def evict(self, instance: str) -> None:
        for record in self.registry.ranks(instance):
            self.registry.evict(record)


def etcd_unavailable(_: Rank) -> None:
    with LocalEtcd() as etcd:
        registry = Registry.connect(etcd.endpoint, timeout_s=1)
    registry.instances()


def source_lost(rank: Rank) -> None:
    rank.load_and_at_half(lambda: rank.signal(signal.SIGKILL))


def stalled(rank: Rank) -> None:
    rank.load_and_at_half(lambda: rank.signal(signal.SIGSTOP))


def dripping(rank: Rank) -> None:
    peer = rank.stack.enter_context(HostilePeer(drips))
    rank.publish("bad", {"w": torch.ones(4)}, rank.stack.enter_context(Impostor(peer.session_id)))
    rank.load("bad", tensors={"w": torch.zeros(4)})


def source_unreachable(rank: Rank) -> None:
    engine = rank.stack.enter_context(Impostor("127.0.0.1:1"))
    engine._protocol = "rdma"
    rank.publish("over-rdma", {"w": torch.ones(4)}, engine)
    rank.load("over-rdma", tensors={"w": torch.zeros(4)})


def source_evicted(rank: Rank) -> None:
    rank.load_and_at_half(lambda: rank.evict(SOURCE))


def cancelled(rank: Rank) -> None:
    cancel = threading.Event()
    rank.load_and_at_half(cancel.set, cancel=cancel)


def interrupted(rank: Rank) -> None:
    rank.load_and_at_half(lambda: os.kill(os.getpid(), signal.SIGINT))


def torn_read(rank: Rank) -> None:
    tensors = {"w": torch.zeros(1 << 20)}
    publication = rank.publish("changing", tensors)

    def update() -> None:
        with publication.update():
            tensors["w"].add_(1)

    def progress(_: Progress) -> None:
        update()

    patient = replace(PACE, stall_s=20.0, patience_s=20.0)  # a busy machine is no stopped source
    rank.load("changing", tensors={"w": torch.ones(1 << 20)}, progress=progress, pace=patient)


def version_unavailable(rank: Rank) -> None:
    rank.load(version=77)


def weights_mismatch(rank: Rank) -> None:
    rank.load(tensors={"t0": torch.zeros(3)})


def digests_missing(rank: Rank) -> None:
    rank.publish("plain", {"w": torch.ones(4)})
    rank.load("plain", tensors={"w": torch.zeros(4)}, verify="digest")


def digest_mismatch(rank: Rank) -> None:
    tensors = {"w": torch.ones(1 << 10)}
    rank.publish("written-over", tensors, digests=True)
    tensors["w"][7] = 3.0
    rank.load("written-over", tensors={"w": torch.zeros(1 << 10)}, verify="digest")


def memory_in_use(rank: Rank) -> None:
    tensors = empty(NBYTES)
    rank.publish("mine", tensors)
    rank.load(tensors=tensors)


def tensors_unusable(rank: Rank) -> None:
    tensors = {"w": torch.ones(1 << 10)}
    publication = rank.publish("moved", tensors)
    with publication.update():
        tensors["w"].data = torch.ones(1 << 10)


def instance_not_found(rank: Rank) -> None:
    rank.load("nobody", timeout_s=0.2)


def rank_conflict(rank: Rank) -> None:
    rank.publish("twice", {"w": torch.ones(4)})
    rank.publish("twice", {"w": torch.ones(4)})


def evicted(rank: Rank) -> None:
    publication = rank.publish("gone", {"w": torch.ones(4)})
    rank.evict("gone")
    wait_until(lambda: publication.registration.lost is not None)
    raise publication.registration.lost or AssertionError


ERRORS: dict[str, tuple[str, Callable[[Rank], None]]] = {
    "no etcd": ("EtcdUnavailable", etcd_unavailable),
    "a source is killed": ("SourceLost", source_lost),
    "a source is stopped": ("Stalled", stalled),
    "a source drips": ("Stalled", dripping),
    "a source of another protocol": ("SourceUnreachable", source_unreachable),
    "a source is evicted": ("SourceEvicted", source_evicted),
    "cancelled": ("Cancelled", cancelled),
    "interrupted": ("KeyboardInterrupt", interrupted),
    "weights that change": ("TornRead", torn_read),
    "no such version": ("VersionUnavailable", version_unavailable),
    "other shapes": ("WeightsMismatch", weights_mismatch),
    "no digests": ("DigestsMissing", digests_missing),
    "other digests": ("DigestMismatch", digest_mismatch),
    "published memory": ("MemoryInUse", memory_in_use),
    "weights that moved": ("TensorsUnusable", tensors_unusable),
    "no such instance": ("InstanceNotFound", instance_not_found),
    "a taken rank": ("RankConflict", rank_conflict),
    "evicted": ("Evicted", evicted),
}


def main(name: str, ending: str, source_pid: str) -> None:
    stack = ExitStack()
    registry = stack.enter_context(connect())
    engine = stack.enter_context(MooncakeEngine("127.0.0.1"))
    rank = Rank(stack, registry, engine, int(source_pid))
    try:
        _, cause = ERRORS[name]
        cause(rank)
    finally:
        if ending == "closing":
            stack.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
