"""`python -m benchmarks.gpu`: the measurements, their GPUs, and the report.

Sources and first loads are separate processes, with a separate etcd. Every time is of
bytes that were all looked at where they arrived; every figure is a median of several, after a round
that opens connections and does not count.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import click
import torch

from benchmarks.gpu import loads, rivals, scenarios
from benchmarks.gpu.loads import Place
from benchmarks.gpu.nccl import nccl
from benchmarks.gpu.rows import COLUMNS, Row, goals
from benchmarks.gpu.sets import SETS
from benchmarks.processes import another_process
from engine_cli.render.tables import print_json, print_table
from engine_loader.engines.mooncake.binding import built_transports
from engine_loader.errors import EngineUnavailable
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd

PARTS = (*SETS, "nccl", "host", "failover", "fan-out", "reshard")
_MANY = 10_000  # tensors, of which each look at all of them takes a second
_HOST_SET = "mixed"  # the one that also comes from the host's memory and from a file


@dataclass(frozen=True)
class Devices:
    """Where sources and destinations are, with their numbers; `backend` is torch.distributed's."""

    sources: tuple[str, ...]
    destinations: tuple[str, ...]
    protocol: str = "nvlink_intra"
    backend: str = "nccl"
    gpus: int = 0


@dataclass
class Results:
    rows: list[Row] = field(default_factory=list)
    steps: dict[str, dict[str, float]] = field(default_factory=dict)  # by set and kind of check
    functions: dict[str, list[str]] = field(default_factory=dict)  # by set


def gpus() -> Devices:
    """EngineUnavailable if it cannot be measured here."""
    count = torch.cuda.device_count()
    if count < 2:
        raise EngineUnavailable(
            f"this measures from GPU to GPU, and {count} CUDA GPUs can be used here: run it "
            "on a host with two "
            "(`python -m benchmarks.load` needs none)"
        )
    if not torch.cuda.can_device_access_peer(1, 0):
        raise EngineUnavailable(
            "GPU 1 cannot read the memory of GPU 0: see nvidia-smi topo -p2p r, and `engines "
            "doctor`"
        )
    if "IntraNodeNvlink" not in built_transports():
        raise EngineUnavailable(
            "this transfer engine has no nvlink_intra: install 'engine-registry[cuda12]' or "
            "[cuda13]"
        )
    if count < 4:
        return Devices(("cuda:0", "cuda:0"), ("cuda:1", "cuda:1"), gpus=count)
    return Devices(("cuda:0", "cuda:2"), ("cuda:1", "cuda:2", "cuda:3"), gpus=count)


def measure(
    results: Results,
    devices: Devices,
    only: Collection[str],
    scale: float,
    rounds: int,
    profiled: bool,
    say: Callable[[str], None],
) -> None:
    """Adds to the results as they come: what was measured before something failed is there."""
    parts = [part for part in PARTS if not only or part in only]

    def place(tensor_set: str, device: str) -> Place:
        return Place(tensor_set, scale, device, devices.protocol)

    def add(rows: list[Row]) -> None:
        results.rows += rows
        for row in rows:
            say("  ".join(filter(None, row.cells())))

    with LocalEtcd() as local, Registry.connect(local.endpoint) as registry:
        for name in (name for name in SETS if name in parts):
            src, dst = place(name, devices.sources[0]), place(name, devices.destinations[0])
            some = rounds if len(src.layout) < _MANY else max(1, rounds // 2)
            say(f"the set {name}")
            with another_process(loads.MODULE, "serve", local.endpoint, name, *src.args):
                add(
                    loads.cold_and_warm(
                        local.endpoint, src, dst, rounds // 2 + 1 if name == "mixed" else 1, some
                    )
                )
                rows, steps, lines = loads.in_this_process(registry, src, dst, some, profiled)
                add(rows)
            results.steps |= {f"{name}, {verify}": took for verify, took in steps.items()}
            if lines:
                results.functions[name] = lines
            _free()
            if "nccl" in parts:
                add(nccl(src, dst, devices.backend, some))
            if "host" in parts and name == _HOST_SET:
                add(rivals.from_host(dst, rounds))
                _free()
        src, dst = place("mixed", devices.sources[0]), place("mixed", devices.destinations[0])
        if "failover" in parts:
            say("two sources, and one that is killed")
            both = [place("mixed", device) for device in devices.sources]
            add(scenarios.failover(local.endpoint, registry, both, dst, max(1, rounds // 2)))
            _free()
        if "fan-out" in parts:
            say("several destinations")
            add(
                scenarios.fan_out(
                    local.endpoint,
                    src,
                    [place("mixed", one) for one in devices.destinations],
                    rounds,
                )
            )
        if "reshard" in parts:
            say("other layouts")
            add(scenarios.reshard(local.endpoint, registry, src, dst, rounds))
            _free()
    if 0 < devices.gpus < 4:
        why = f"not run: {devices.gpus} GPUs"
        missing = {
            "failover": "2 sources on 2 GPUs → 1 GPU",
            "fan-out": "1 source → 3 destinations on 3 GPUs",
        }
        results.rows += [
            Row(part, what, note=why) for part, what in missing.items() if part in parts
        ]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- reports
# --------------------------------------------------------------------------------------------------


def report(results: Results, as_json: bool, profiled: bool) -> None:
    wanted = goals(results.rows)
    if as_json:
        steps = {
            name: {step: round(took, 6) for step, took in some.items()}
            for name, some in results.steps.items()
        }
        document = {
            "machine": machine(),
            "rows": [row.as_json() for row in results.rows],
            "steps_s": steps,
        }
        print_json(
            {
                **document,
                "goals": [goal.as_json() for goal in wanted],
                "functions": results.functions,
            }
        )
        return
    for name, value in machine().items():
        click.echo(f"{name}: {value}")
    click.echo()
    print_table(COLUMNS, [row.cells() for row in results.rows])
    click.echo()
    print_table(("GOAL", "WANTED", "FOUND", ""), [goal.cells() for goal in wanted])
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
