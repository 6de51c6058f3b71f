"""What the benchmarks share: timing, percentiles, processes to measure against, and how results are printed."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata

import click

from cli.children import python
from cli.output import print_json


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median_s(action: Callable[[], object], rounds: int = 5) -> float:
    return statistics.median(seconds(action) for _ in range(rounds))


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def call(module: str, function: str, *args: str) -> list[str]:
    """The command that runs `module.function(*args)`."""
    return python(f"from {module} import {function} as run; run(*sys.argv[1:])", *args)


@contextmanager
def another_process(
    module: str, function: str, *args: str, within: Callable[..., list[str]] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """One that runs `module.function(*args)` until the block ends (it sees the end of its standard input), and its first line.

    `within`: the `command` of a Host, to run it there.
    """
    command = call(module, function, *args)
    process = subprocess.Popen(
        within(*command) if within is not None else command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise SystemExit(f"{module}.{function} did not start")
            yield process, line.strip()
        finally:
            if process.stdin is not None:
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def report(results: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        versions = {name: metadata.version(name) for name in ("engine-registry", "etcd3", "grpcio", "protobuf")}
        machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version(), **versions}
        print_json({"machine": machine, "results": {name: round(value, 6) for name, value in results.items()}})
        return
    for name, value in results.items():
        click.echo(f"{name:56} {value:12.4f}")
