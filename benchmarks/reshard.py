"""`python -m benchmarks.reshard`: loading into another layout over tcp on this machine, medians of
several rounds that take turns.

The weights are matrices. *contiguous* is the baseline: the upper half of each, which lies in one
run at the source. What the others fill lies in short runs there or here. *dcp* is
`torch.distributed.checkpoint.load` of one state: through `EngineReader`, and from its files
that lie in the page cache. Sources are separate processes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

from benchmarks import figures, options, serving
from benchmarks.figures import Results, median_s
from benchmarks.processes import another_process, ready
from benchmarks.serving import HOST, MODEL
from engine_cli.main import main
from engine_cli.options import engine_log
from engine_loader import (
    EngineReader,
    LoadReport,
    MooncakeEngine,
    Shard,
    load,
    publish_state_dict,
)
from engine_loader.planning.matching import Origin
from engine_loader.planning.plan import plan
from engine_registry import Manifest, Region, Registry, TensorEntry
from engine_registry.etcd.local import LocalEtcd

_SIDE = 4096  # of a matrix of 16-bit numbers: 32 MiB


@dataclass(frozen=True)
class Cut:
    """The part `index` of `of` equal parts of every matrix along `dim`."""

    dim: int
    index: int
    of: int

    def tensors(self, count: int) -> tuple[dict[str, torch.Tensor], dict[str, Shard]]:
        bounds = [_SIDE * number // self.of for number in (self.index, self.index + 1)]
        shape, offsets = [_SIDE, _SIDE], [0, 0]
        shape[self.dim], offsets[self.dim] = bounds[1] - bounds[0], bounds[0]
        names = [f"layer.{number}.weight" for number in range(count)]
        tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name in names}
        return tensors, dict.fromkeys(names, Shard((_SIDE, _SIDE), (offsets[0], offsets[1])))


ROWS, COLUMNS = 0, 1
WHOLE = Cut(ROWS, 0, 1)
# How the ranks of the source cut the matrices, and which part is filled.
CASES: dict[str, tuple[list[Cut], Cut]] = {
    "contiguous": ([WHOLE], Cut(ROWS, 0, 2)),
    "column_of_whole": ([WHOLE], Cut(COLUMNS, 0, 2)),
    "whole_of_2_columns": ([Cut(COLUMNS, 0, 2), Cut(COLUMNS, 1, 2)], WHOLE),
    "columns_2_to_3": ([Cut(COLUMNS, 0, 2), Cut(COLUMNS, 1, 2)], Cut(COLUMNS, 1, 3)),
    "columns_4_to_2": ([Cut(COLUMNS, number, 4) for number in range(4)], Cut(COLUMNS, 1, 2)),
}


def measure(gib: float, rounds: int, say: Callable[[str], None]) -> Results:
    count = max(1, int(gib * (1 << 30)) // (2 * _SIDE * _SIDE))
    results: Results = {}
    with LocalEtcd() as local, Registry.connect(local.endpoint) as registry:
        say(f"{count} matrices, into parts of them")
        results |= parts(local, registry, count, rounds)
        say("torch's distributed checkpoint, from ranks and from files")
        results |= distributed_checkpoint(local, registry, count, rounds)
    say("plan of 60,000 boxes a side")
    results["plan_60000_boxes_s"] = median_s(_plan_of(*_mixture_of_experts()), 3)
    return results


# -- parts of matrices
# --------------------------------------------------------------------------------------------------


def parts(local: LocalEtcd, registry: Registry, count: int, rounds: int) -> Results:
    took: dict[str, list[LoadReport]] = {name: [] for name in CASES}
    with ExitStack() as stack:
        layouts: list[Sequence[Cut]] = []
        for cuts, _ in CASES.values():
            if cuts not in layouts:
                layouts.append(cuts)
                _serve_all(stack, local, _instance_of(cuts), cuts, count)
        engine = stack.enter_context(MooncakeEngine(HOST))
        into = {name: part.tensors(count) for name, (_, part) in CASES.items()}
        for number in range(rounds + 1):
            for name, (cuts, _) in CASES.items():
                tensors, shards = into[name]
                report = load(registry, engine, _instance_of(cuts), tensors=tensors, shards=shards)
                if number:  # the first round opens connections
                    took[name].append(report)
    results: Results = {}
    for name, reports in took.items():
        results[f"{name}_gb_per_s"] = statistics.median(one.gb_per_s for one in reports)
        results[f"{name}_read_to_needed"] = statistics.median(
            one.read_nbytes / one.nbytes for one in reports
        )
        if name != "contiguous":
            results[f"{name}_to_contiguous"] = statistics.median(
                one.gb_per_s / base.gb_per_s
                for one, base in zip(reports, took["contiguous"], strict=True)
            )
    return results


def _instance_of(cuts: Sequence[Cut]) -> str:
    return f"{cuts[0].of}-{cuts[0].dim}"


def _serve_all(
    stack: ExitStack, local: LocalEtcd, instance: str, cuts: Sequence[Cut], count: int
) -> None:
    for cut in cuts:
        numbers = map(str, (cut.dim, cut.index, cut.of, count))
        stack.enter_context(
            another_process("benchmarks.reshard", "serve", local.endpoint, instance, *numbers)
        )


def serve(endpoint: str, instance: str, *numbers: str) -> None:
    dim, index, of, count = map(int, numbers)
    tensors, shards = Cut(dim, index, of).tensors(count)
    serving.serve(endpoint, instance, tensors, shards, rank=index, world_size=of)


# -- torch's distributed checkpoint
# ----------------------------------------------------------------------------------------------


def distributed_checkpoint(
    local: LocalEtcd, registry: Registry, count: int, rounds: int
) -> Results:
    state = _state(count)
    nbytes = sum(tensor.nbytes for tensor in state["model"].values())
    with (
        tempfile.TemporaryDirectory(prefix="engines-bench-") as folder,
        another_process("benchmarks.reshard", "serve_state", local.endpoint, "state", str(count)),
        MooncakeEngine(HOST) as engine,
    ):
        save_checkpoint(state, storage_writer=FileSystemWriter(folder), no_dist=True)
        readers: dict[str, Callable[[], Any]] = {
            "engine": lambda: EngineReader(registry, engine, "state"),
            "files": lambda: FileSystemReader(folder),
        }
        took: dict[str, list[float]] = {name: [] for name in readers}
        for number in range(rounds + 1):
            for name, reader in readers.items():
                start = time.perf_counter()
                load_checkpoint(state, storage_reader=reader(), no_dist=True)
                if number:
                    took[name].append(time.perf_counter() - start)
    results = {
        f"dcp_{name}_gb_per_s": nbytes / 1e9 / statistics.median(some)
        for name, some in took.items()
    }
    results["dcp_engine_to_files"] = statistics.median(
        f / e for e, f in zip(took["engine"], took["files"], strict=True)
    )
    return results


def serve_state(endpoint: str, instance: str, count: str) -> None:
    with (
        Registry.connect(endpoint) as registry,
        MooncakeEngine(HOST) as engine,
        publish_state_dict(
            registry,
            engine,
            _state(int(count)),
            instance=instance,
            rank=0,
            world_size=1,
            model=MODEL,
        ),
    ):
        ready("published")


def _state(count: int) -> dict[str, Any]:
    return {"model": WHOLE.tensors(count)[0], "step": 7}


# -- planning
# --------------------------------------------------------------------------------------------------


def _mixture_of_experts() -> tuple[list[Origin], Manifest]:
    """61 layers of 328 experts with three weights each, by experts on 8 ranks; half of the columns
    of each is wanted.
    """
    names = [
        f"{layer}.{expert}.{weight}"
        for layer in range(61)
        for expert in range(328)
        for weight in ("gate", "up", "down")
    ]
    ranks = [_manifest(names[rank::8], (64, 128), rank + 1) for rank in range(8)]
    return [
        Origin(f"moe/{rank}", manifest, own=False) for rank, manifest in enumerate(ranks)
    ], _manifest(names, (64, 64), 100)


def _manifest(names: Sequence[str], shape: tuple[int, int], number: int) -> Manifest:
    base, nbytes = number << 40, shape[0] * shape[1]
    entries = [
        TensorEntry(
            name, "uint8", shape, base + at * nbytes, nbytes, (64, 128), (0, 0), opaque=False
        )
        for at, name in enumerate(names)
    ]
    return Manifest(tuple(entries), (Region(base, nbytes * len(names)),))


def _plan_of(origins: Sequence[Origin], dst: Manifest) -> Callable[[], object]:
    return lambda: plan(origins, dst, partial=True)


@options.program
@options.gib(1.0, "Size of the weights.")
@options.rounds(5)
def command(gib: float, rounds: int, as_json: bool) -> None:
    """Loading into another layout, and torch's distributed checkpoint. Takes minutes."""
    with engine_log():
        figures.report(measure(gib, rounds, figures.say), as_json)


if __name__ == "__main__":
    main(command, "benchmarks.reshard")
