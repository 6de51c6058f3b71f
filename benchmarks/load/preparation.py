"""What comes before the reads: start-up of processes, registering, planning."""

from __future__ import annotations

import statistics
import subprocess
import time
from contextlib import ExitStack

import torch

from benchmarks.figures import Results, median_s
from benchmarks.serving import MODEL
from engine_cli.runtime.children import python
from engine_loader import InProcessEngine, publish
from engine_loader.planning.matching import Origin
from engine_loader.planning.plan import plan
from engine_registry import Manifest, Region, Registry, TensorEntry


def start_up(registry: Registry) -> Results:
    def run(code: str) -> float:
        return median_s(
            lambda: subprocess.run(python(code), check=True, stdout=subprocess.DEVNULL), 9
        )

    return {
        "import_registry_s": run("from engine_registry import Registry") - run("pass"),
        "engines_help_s": run(
            "sys.argv = ['engines', '--help']; from engine_cli.main import main; main()"
        ),
        "register_2500_tensors_s": register(registry, 2_500),
    }


def register(registry: Registry, count: int) -> float:
    """From `publish` to the record in etcd: keeper process started, a storage registered for each
    tensor.
    """
    tensors = {f"layer.{number}.weight": torch.zeros(1024) for number in range(count)}

    def once() -> float:
        with ExitStack() as stack:
            engine = stack.enter_context(InProcessEngine())
            start = time.perf_counter()
            stack.enter_context(
                publish(
                    registry,
                    engine,
                    instance="r",
                    rank=0,
                    world_size=1,
                    tensors=tensors,
                    model=MODEL,
                )
            )
            return time.perf_counter() - start

    return statistics.median(once() for _ in range(5))


def plan_of_many(count: int) -> float:
    """Of tensors that do not follow each other, so that each needs a separate read."""

    def manifest(base: int, step: int) -> Manifest:
        entries = [
            TensorEntry(f"t{n}", "uint8", (64,), base + n * step, 64, (64,), (0,))
            for n in range(count)
        ]
        return Manifest(tuple(entries), (Region(base, count * step),))

    src, dst = manifest(1 << 20, 128), manifest(1 << 40, 192)
    return median_s(lambda: plan([Origin("src/0", src)], dst), 3)
