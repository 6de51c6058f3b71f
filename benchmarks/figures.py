"""How the benchmarks take their figures, and how they print them."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import click

from engine_cli.render.tables import print_json
from engine_registry.version import package_version

Results = dict[str, float]


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median_s(action: Callable[[], object], rounds: int = 5) -> float:
    return statistics.median(seconds(action) for _ in range(rounds))


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has taken."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def memory_nbytes(pid: int, kind: str = "VmRSS") -> int:
    """Of a process: resident now, or `VmHWM` at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(kind))


def share_nbytes(pid: int) -> int:
    """Of a process's resident memory, with a share of what several processes have in common."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def say(what: str) -> None:
    click.echo(f"measuring: {what}", err=True)


def machine() -> dict[str, object]:
    versions = {name: metadata.version(name) for name in ("etcd3", "grpcio", "protobuf")}
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "engine-registry": package_version(),  # empty in a checkout that is not installed
        **versions,
    }


def report(results: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "machine": machine(),
                "results": {name: round(value, 6) for name, value in results.items()},
            }
        )
        return
    for name, value in results.items():
        click.echo(f"{name:56} {value:12.4f}")
