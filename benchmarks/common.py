"""What the benchmarks share: timing, percentiles, and how results are printed."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median_s(action: Callable[[], object], rounds: int = 5) -> float:
    return statistics.median(seconds(action) for _ in range(rounds))


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def report(results: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        versions = {name: metadata.version(name) for name in ("engine-registry", "etcd3", "grpcio", "protobuf")}
        machine = {"machine": platform.machine(), "python": platform.python_version(), **versions}
        print(json.dumps({"machine": machine, "results": {name: round(value, 6) for name, value in results.items()}}))
        return
    for name, value in results.items():
        print(f"{name:44} {value:12.4f}")
