"""Loads from two sources, one of which is killed or stopped."""

from __future__ import annotations

import signal
import statistics
from typing import Any

import torch

from benchmarks.figures import Results
from benchmarks.load.sources import source
from benchmarks.serving import HOST
from engine_loader import LoadOptions, MooncakeEngine, Progress, load
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd


def failover(local: LocalEtcd, registry: Registry, nbytes: int, rounds: int) -> Results:
    """What the loss of one of two sources at half adds to a load from both, and what a lone one
    that stops costs.
    """
    results: Results = {}
    tensors = {f"t{number}": torch.zeros(nbytes // 500, dtype=torch.uint8) for number in range(500)}
    undisturbed: list[float] = []
    for fault, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
        disturbed: list[float] = []
        for _ in range(max(1, rounds // 2)):
            with (
                MooncakeEngine(HOST) as engine,
                source(local, "b", "blocks", str(nbytes), "500"),
                source(local, "a", "blocks", str(nbytes), "500") as victim,
            ):
                load(registry, engine, ["a", "b"], rank=0, tensors=tensors)
                undisturbed.append(
                    load(registry, engine, ["a", "b"], rank=0, tensors=tensors).seconds
                )

                def at_half(progress: Progress, victim: Any = victim, number: int = number) -> None:
                    if progress.nbytes * 2 >= progress.total_nbytes:
                        victim.send_signal(number)

                try:
                    options = LoadOptions(progress=at_half)
                    disturbed.append(
                        load(
                            registry, engine, ["a", "b"], rank=0, tensors=tensors, options=options
                        ).seconds
                    )
                finally:
                    victim.kill()
        results[f"two_sources_{fault}_one_at_half_adds_s"] = statistics.median(
            disturbed
        ) - statistics.median(undisturbed)
    results["two_sources_gb_per_s"] = nbytes / 1e9 / statistics.median(undisturbed)
    return results
