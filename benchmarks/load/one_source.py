"""Loads from one source, in turns with the naive way."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.figures import Results, median_s, memory_nbytes, seconds
from benchmarks.naive import naive_load
from benchmarks.serving import HOST
from engine_loader import LoadOptions, LoadReport, MooncakeEngine, load
from engine_loader.digests.table import digests_of
from engine_loader.files.memory import allocate_like
from engine_registry import Registry


def one_source(registry: Registry, rounds: int) -> Results:
    results = against_naive(registry, rounds)
    tensors = _destination(registry)
    with MooncakeEngine(HOST) as engine:
        load(registry, engine, "src", rank=0, tensors=tensors)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory_nbytes(os.getpid(), "VmHWM")
        reports = [load(registry, engine, "src", rank=0, tensors=tensors) for _ in range(rounds)]
        results["peak_extra_mib"] = (memory_nbytes(os.getpid(), "VmHWM") - before) / (1 << 20)
        results["overhead_share"] = statistics.median(
            (one.seconds - one.transfer_s) / one.seconds for one in reports
        )
        options = LoadOptions(verify="digest")
        verified = [
            load(registry, engine, "src", rank=0, tensors=tensors, options=options)
            for _ in range(rounds)
        ]
        results["digest_share"] = statistics.median(one.digest_s / one.seconds for one in verified)
        nbytes = verified[0].nbytes
    results["digest_gb_per_s"] = (
        nbytes / 1e9 / median_s(lambda: digests_of(tensors, "xxh3_128"), rounds)
    )
    return results


def _destination(registry: Registry) -> dict[str, torch.Tensor]:
    """In one block where they are at the source, else each tensor in a separate storage."""
    (record,) = registry.resolve("src", 60)
    manifest = registry.manifest(record)
    tensors = allocate_like(manifest)
    return (
        tensors
        if len(manifest.regions) == 1
        else {name: tensor.clone() for name, tensor in tensors.items()}
    )


def against_naive(registry: Registry, rounds: int) -> Results:
    """Throughput and CPU of ours and of the naive way, taking turns."""
    tensors = _destination(registry)
    ours: list[tuple[float, float]] = []
    naive: list[tuple[float, float]] = []
    reports: list[LoadReport] = []
    with MooncakeEngine(HOST) as engine, naive_load(registry, "src", tensors) as naive_way:
        nbytes = naive_way.nbytes
        for number in range(rounds + 1):
            took = (
                _timed(naive_way.run),
                _timed(
                    lambda: reports.append(load(registry, engine, "src", rank=0, tensors=tensors))
                ),
            )
            if number:  # the first round opens connections
                naive.append(took[0])
                ours.append(took[1])
    ours_s, ours_cpu_s = (statistics.median(one) for one in zip(*ours, strict=True))
    naive_s, naive_cpu_s = (statistics.median(one) for one in zip(*naive, strict=True))
    return {
        "ours_gb_per_s": nbytes / 1e9 / ours_s,
        "naive_gb_per_s": nbytes / 1e9 / naive_s,
        "ours_to_naive": statistics.median(n[0] / o[0] for o, n in zip(ours, naive, strict=True)),
        "our_reads_to_naive": statistics.median(
            n[0] / o.transfer_s for o, n in zip(reports[1:], naive, strict=True)
        ),
        "ours_cpu_s_per_gb": ours_cpu_s / (nbytes / 1e9),
        "naive_cpu_s_per_gb": naive_cpu_s / (nbytes / 1e9),
    }


def _timed(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time, and of CPU time of this process."""
    cpu = time.process_time()
    took = seconds(action)
    return took, time.process_time() - cpu
