"""Loads into other layouts: matrices that are whole, cut by rows and cut by columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from benchmarks import serving
from benchmarks.gpu.loads import Place, use
from benchmarks.gpu.rows import Row, Target, in_turns, reads_of
from benchmarks.gpu.sets import Layout, Tensors, filled
from benchmarks.processes import several_processes
from benchmarks.serving import HOST
from engine_loader import Engine, LoadReport, Shard, load, open_engine
from engine_registry import Registry

GROUP = "reshard"
_MODULE = "benchmarks.gpu.layouts"
_SIDES = (8192, 4096)  # of a matrix of 16-bit numbers: 64 MiB
_MATRICES = 64
_WAYS = {"whole": (0, 1), "rows": (0, 2), "columns": (1, 2)}  # the dim that is cut, and into what
# What is filled: the source, and the dim, the index and the number of the parts.
_CASES = {
    "same layout": ("whole", 0, 0, 1),
    "tp 2→1, rows": ("rows", 0, 0, 1),
    "tp 2→1, columns": ("columns", 0, 0, 1),
    "tp 1→2, rows": ("whole", 0, 1, 2),
    "tp 1→2, columns": ("whole", 1, 1, 2),
}
# Each beside one that brings as many bytes in runs as long as a matrix, or half of it.
BESIDE = (
    ("tp 2→1, rows", "same layout"),
    ("tp 2→1, columns", "same layout"),
    ("tp 1→2, columns", "tp 1→2, rows"),
)


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


def reshard(
    endpoint: str, registry: Registry, src: Place, dst: Place, protocols: Sequence[str], rounds: int
) -> list[Row]:
    """Into whole matrices and into the second half, the protocols in turns."""
    use(dst.device)
    whole = filled(_matrices(dst.scale), dst.device)
    calls = [
        (endpoint, f"{way}.{protocol}", src.device, protocol, str(src.scale), *map(str, cut))
        for protocol in protocols
        for way, (dim, of) in _WAYS.items()
        for cut in ((dim, index, of) for index in range(of))
    ]
    rows: list[Row] = []
    with several_processes(_MODULE, "serve_part", calls), ExitStack() as stack:
        engines = [stack.enter_context(open_engine(HOST, protocol)) for protocol in protocols]
        for what, (source, *cut) in _CASES.items():
            wanted, shards = _cut(whole, *cut)
            rows += _case(registry, engines, what, source, wanted, shards, rounds)
    return rows


def _case(
    registry: Registry,
    engines: Sequence[Engine],
    what: str,
    source: str,
    wanted: Tensors,
    shards: dict[str, Shard],
    rounds: int,
) -> list[Row]:
    target = Target({name: torch.empty_like(tensor) for name, tensor in wanted.items()}, wanted)
    reports: dict[str, list[LoadReport]] = {engine.protocol: [] for engine in engines}

    def action(engine: Engine) -> float:
        fill: Callable[[], LoadReport] = partial(
            load,
            registry,
            engine,
            f"{source}.{engine.protocol}",
            tensors=target.tensors,
            shards=shards,
        )
        took, report = target.time(what, fill)
        reports[engine.protocol].append(report)
        return took

    took = in_turns({engine.protocol: partial(action, engine) for engine in engines}, rounds)
    rows = []
    for protocol, samples in took.items():
        counted = reports[protocol][-rounds:]
        last = counted[-1]
        note = f"{last.reads} reads of {last.read_nbytes / last.nbytes:.2f} times the bytes"
        reads = tuple(report.transfer_s for report in counted)
        rows += [
            Row(GROUP, what, target.nbytes, tuple(samples), note, protocol),
            Row(GROUP, reads_of(what), target.nbytes, reads, "", protocol),
        ]
    return rows
