"""Loads that take more than two processes: a source that is killed, several sources, several
destinations, other layouts.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import serving
from benchmarks.gpu.loads import MODULE, Place, use
from benchmarks.gpu.rows import Row, Target
from benchmarks.gpu.sets import Layout, Tensors, allocate, filled, nbytes_of
from benchmarks.processes import answer, order, several_processes
from benchmarks.serving import HOST
from engine_loader import LoadOptions, LoadReport, MooncakeEngine, Progress, Shard, load
from engine_registry import Registry

_GONE_S = 20.0
_SIDES = (8192, 4096)  # of a matrix of 16-bit numbers: 64 MiB
_MATRICES = 64


# -- a source that is killed
# --------------------------------------------------------------------------------------------------


def failover(
    endpoint: str, registry: Registry, sources: list[Place], dst: Place, rounds: int
) -> list[Row]:
    """Two sources; then one is killed when the first bytes have come, and loads follow each other
    until it is gone.
    """
    use(dst.device)
    target = Target(allocate(dst.layout, dst.device), filled(dst.layout, dst.device))
    both: list[tuple[float, LoadReport]] = []
    killed: list[float] = []
    longest: list[float] = []
    dropped = 0
    for _ in range(rounds):
        calls = [
            (endpoint, name, *place.args) for name, place in zip(("a", "b"), sources, strict=True)
        ]
        with (
            several_processes(MODULE, "serve", calls) as ((victim, _), _),
            MooncakeEngine(HOST, dst.protocol) as engine,
        ):

            def once(
                progress: Any = None, engine: MooncakeEngine = engine
            ) -> tuple[float, LoadReport]:
                def fill() -> LoadReport:
                    return load(
                        registry,
                        engine,
                        ["a", "b"],
                        rank=0,
                        tensors=target.tensors,
                        options=LoadOptions(progress=progress),
                    )

                return target.time("load() from two sources", fill)

            once()
            both += [once() for _ in range(3)]

            def kill(progress: Progress, victim: subprocess.Popen[str] = victim) -> None:
                if progress.nbytes:
                    victim.send_signal(signal.SIGKILL)

            took, report = once(kill)
            killed.append(took)
            dropped += _dropped(report)
            after = [took]
            until = time.monotonic() + _GONE_S
            while len(report.shares) > 1 and time.monotonic() < until:
                took, report = once()
                after.append(took)
                dropped += _dropped(report)
            longest.append(max(after))
    adds = 1e3 * (statistics.median(longest) - statistics.median(took for took, _ in both))
    group, nbytes = "failover", target.nbytes
    where = f"{' and '.join(place.device for place in sources)} → {dst.device}"
    return [
        Row(group, "2 sources", nbytes, tuple(took for took, _ in both), where),
        Row(group, "2 sources: its reads", nbytes, tuple(report.transfer_s for _, report in both)),
        Row(
            group,
            "one SIGKILLed at the first bytes",
            nbytes,
            tuple(killed),
            "every byte as it should be",
        ),
        Row(
            group,
            "longest load until it is gone from etcd",
            nbytes,
            tuple(longest),
            f"adds {adds:.1f} ms; {dropped} loads of {rounds} kills went on without it",
        ),
    ]


def _dropped(report: LoadReport) -> int:
    return sum(share.error is not None for share in report.shares)


# -- several destinations
# --------------------------------------------------------------------------------------------------


def fan_out(endpoint: str, src: Place, destinations: list[Place], rounds: int) -> list[Row]:
    """All load at the same time from one source: from the first one's beginning to the last one's
    end.
    """
    took: list[float] = []
    with several_processes(MODULE, "serve", [(endpoint, "one", *src.args)]):
        calls = [(endpoint, "one", *place.args) for place in destinations]
        with several_processes(MODULE, "load_again", calls) as loaders:
            for _ in range(rounds):
                for process, _ in loaders:
                    order(process, "go")
                clocks = [
                    json.loads(answer(process, "a loading process")) for process, _ in loaders
                ]
                took.append(max(ended for _, ended in clocks) - min(began for began, _ in clocks))
    nbytes = len(destinations) * nbytes_of(src.layout)
    where = f"{src.device} → {', '.join(place.device for place in destinations)}"
    return [
        Row(
            "fan-out",
            f"1 source, {len(destinations)} destinations",
            nbytes,
            tuple(took),
            f"{where}; GB/s of all together",
        )
    ]


# -- other layouts
# --------------------------------------------------------------------------------------------------


def _cut(whole: Tensors, dim: int, index: int, of: int) -> tuple[Tensors, dict[str, Shard]]:
    """The part `index` of `of` equal parts of each along `dim`, and which part that is."""
    parts, shards = {}, {}
    for name, tensor in whole.items():
        size = tensor.shape[dim] // of
        parts[name] = tensor.narrow(dim, index * size, size).clone(
            memory_format=torch.contiguous_format
        )
        shards[name] = Shard(
            tuple(tensor.shape),
            tuple(index * size if axis == dim else 0 for axis in range(tensor.dim())),
        )
    return parts, shards


def _matrices(scale: float) -> Layout:
    names = [f"matrix.{number}" for number in range(max(1, round(_MATRICES * scale)))]
    return dict.fromkeys(names, (torch.bfloat16, _SIDES))


def serve_part(
    endpoint: str, instance: str, device: str, protocol: str, scale: str, *cut: str
) -> None:
    use(device)
    dim, index, of = map(int, cut)
    whole = filled(_matrices(float(scale)), device)
    parts, shards = _cut(whole, dim, index, of)
    del whole
    serving.serve(endpoint, instance, parts, shards, protocol=protocol, rank=index, world_size=of)


def reshard(endpoint: str, registry: Registry, src: Place, dst: Place, rounds: int) -> list[Row]:
    """Matrices that are whole, cut by rows and cut by columns; into whole ones and into the second
    half.
    """
    use(dst.device)
    whole = filled(_matrices(dst.scale), dst.device)
    ways = {"whole": (0, 1), "rows": (0, 2), "columns": (1, 2)}
    common = (src.device, src.protocol, str(src.scale))
    cuts = [(name, dim, index, of) for name, (dim, of) in ways.items() for index in range(of)]
    calls = [
        (endpoint, name, *common, str(dim), str(index), str(of)) for name, dim, index, of in cuts
    ]
    rows: list[Row] = []
    with (
        several_processes("benchmarks.gpu.scenarios", "serve_part", calls),
        MooncakeEngine(HOST, dst.protocol) as engine,
    ):

        def case(what: str, source: str, dim: int, index: int, of: int) -> None:
            wanted, shards = _cut(whole, dim, index, of)
            target = Target(
                {name: torch.empty_like(tensor) for name, tensor in wanted.items()}, wanted
            )
            fill: Callable[[], LoadReport] = partial(
                load, registry, engine, source, tensors=target.tensors, shards=shards
            )
            target.time(what, fill)  # opens connections
            took = [target.time(what, fill) for _ in range(rounds)]
            last = took[-1][1]
            note = f"{last.reads} reads of {last.read_nbytes / last.nbytes:.2f} times the bytes"
            rows.append(
                Row("reshard", what, target.nbytes, tuple(seconds for seconds, _ in took), note)
            )
            rows.append(
                Row(
                    "reshard",
                    f"{what}: its reads",
                    target.nbytes,
                    tuple(report.transfer_s for _, report in took),
                )
            )

        case("same layout", "whole", 0, 0, 1)
        case("tp 2→1, rows", "rows", 0, 0, 1)
        case("tp 2→1, columns", "columns", 0, 0, 1)
        case("tp 1→2, rows", "whole", 0, 1, 2)
        case("tp 1→2, columns", "whole", 1, 1, 2)
    return rows
