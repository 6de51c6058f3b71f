"""The report of `python -m benchmarks.gpu`: tables, or JSON, with the machine that was measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import click
import torch

from benchmarks.gpu.goals import goals
from benchmarks.gpu.rows import COLUMNS, Row
from engine_cli.render.tables import print_json, print_table


@dataclass
class Results:
    """`protocol` is the one that goals are about. Seconds of steps are by set, protocol and way of
    loading, lines of functions by set and protocol, counts by part.
    """

    protocol: str = ""
    rows: list[Row] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    steps: dict[str, dict[str, float]] = field(default_factory=dict)
    functions: dict[str, list[str]] = field(default_factory=dict)


def report(results: Results, as_json: bool, profiled: bool) -> None:
    wanted = goals(results.rows, results.counts, results.protocol)
    if as_json:
        steps = {
            name: {step: round(took, 6) for step, took in some.items()}
            for name, some in results.steps.items()
        }
        document = {
            "machine": machine(),
            "rows": [row.as_json() for row in results.rows],
            "counts": results.counts,
            "steps_s": steps,
            "goals": [goal.as_json() for goal in wanted],
            "functions": results.functions,
        }
        print_json(document)
        return
    for name, value in machine().items():
        click.echo(f"{name}: {value}")
    click.echo()
    print_table(COLUMNS, [row.cells() for row in results.rows])
    if results.counts:
        click.echo()
        counts = [
            [part, what, str(count)]
            for part, some in results.counts.items()
            for what, count in some.items()
        ]
        print_table(("PART", "WHAT", "HOW OFTEN"), counts)
    click.echo()
    print_table(
        (f"GOAL of {results.protocol}", "WANTED", "FOUND", ""), [goal.cells() for goal in wanted]
    )
    if not profiled:
        return
    for name, some in results.steps.items():
        click.echo(f"\nload() of {name}, {1e3 * sum(some.values()):.1f} ms by its steps:")
        print_table(("STEP", "ms"), [[step, f"{1e3 * took:.2f}"] for step, took in some.items()])
    for name, lines in results.functions.items():
        click.echo(f"\nload() of {name}, by its functions, several loads:")
        click.echo("\n".join(lines))


def machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "nvlink": _nvlink() if cuda else "",
        "driver": _ask("--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        if cuda
        else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else "",
        "triton": _version("triton"),
        "mooncake": _version(
            "mooncake-transfer-engine-cuda13",
            "mooncake-transfer-engine",
            "mooncake-transfer-engine-non-cuda",
        ),
        "engine-registry": _version("engine-registry"),
    }


def _nvlink() -> str:
    """How many links, and how fast each is, by the words of nvidia-smi."""
    links = re.findall(r"Link \d+: ([\d.]+ GB/s)", _ask("nvlink", "--status", "--id=0"))
    return f"{len(links)} links of {links[0]}" if links else "not known"


def _ask(*args: str) -> str:
    try:
        return subprocess.run(
            ["nvidia-smi", *args], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(*names: str) -> str:
    """Of the first of these distributions that is installed."""
    for name in names:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "not known"
