"""Ranks of the benchmarks of the control plane: their records, and ranks with a keeper."""

from __future__ import annotations

from benchmarks.processes import ready
from engine_registry import Manifest, ModelIdentity, Region, Registration, Registry, TensorEntry
from engine_registry.registration.handle import OnState
from engine_registry.schema.record import ManifestRef, RankRecord

MODEL = ModelIdentity("bench", "r1", "bfloat16")
THREADS = 8


def a_manifest(tensors: int) -> Manifest:
    entries = [
        TensorEntry(
            f"model.layers.{n // 9}.w{n % 9}",
            "bfloat16",
            (512, 64),
            4096 + n * 65536,
            65536,
            (512, 64),
            (0, 0),
        )
        for n in range(tensors)
    ]
    return Manifest(tuple(entries), (Region(4096, tensors * 65536),))


def a_record(instance: str, rank: int, world_size: int, ref: ManifestRef) -> RankRecord:
    return RankRecord(
        incarnation=f"{rank:032x}",
        instance=instance,
        rank=rank,
        world_size=world_size,
        model=MODEL,
        session_id=f"10.0.{rank // 250}.{rank % 250}:15000",
        protocol="rdma",
        manifest=ref,
        header_addr=4096,
        registered_at="2026-01-01T00:00:00.000+00:00",
        topology={"tp": (rank % 8, 8)},
        host=f"node-{rank // 8}",
        pid=4000,
    )


def hold(
    registry: Registry,
    instance: str,
    rank: int,
    world_size: int,
    ttl_s: float = 10.0,
    on_state: OnState | None = None,
) -> Registration:
    return registry.register(
        instance=instance,
        rank=rank,
        world_size=world_size,
        model=MODEL,
        manifest=a_manifest(100),
        session_id="h:1",
        protocol="tcp",
        header_addr=0,
        ttl_s=ttl_s,
        on_state=on_state,
    )


def a_rank(endpoint: str, rank: str) -> None:
    with (
        Registry.connect(endpoint) as registry,
        hold(registry, "mortal", int(rank), 1000) as registration,
    ):
        ready(registration.keeper_pid)
