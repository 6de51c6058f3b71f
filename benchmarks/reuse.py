"""`python -m benchmarks.reuse`: loads into tensors that hold most of the weights already, over tcp
and socket on this machine, medians of several rounds that take turns.

The weights are layers of 32 MiB. Before each load some blocks of 1 MiB are made to differ here. The
baseline is a load that reads everything. Socket reads go over a connection, as between hosts. The
source is a separate process.

Then, where the machine can have hosts within it, loads of weights that are mostly on other hosts
already: see `benchmarks.lent`.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

from benchmarks import figures, lent, options, serving
from benchmarks.figures import Results, median_s
from benchmarks.hosts import HostsUnavailable
from benchmarks.processes import another_process
from benchmarks.serving import HOST
from engine_cli.main import main
from engine_cli.options import engine_log
from engine_loader import LoadOptions, LoadReport, load, open_engine
from engine_loader.digests.table import digests_of
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd

_LAYER_NBYTES, _BLOCK_NBYTES = 32 << 20, 1 << 20
_PERCENT = (0, 1, 10, 100)
_LINKED_LAYERS = 2  # that come over a slow link


def measure(gib: float, rounds: int, say: Callable[[str], None]) -> Results:
    count = max(1, round(gib * (1 << 30) / _LAYER_NBYTES))
    results: Results = {}
    with LocalEtcd() as local, Registry.connect(local.endpoint) as registry:
        for protocol in ("tcp", "socket"):
            say(f"{count} layers over {protocol}")
            with (
                _apart(),
                another_process("benchmarks.reuse", "serve", local.endpoint, protocol, str(count)),
            ):
                results |= _loads(registry, protocol, count, rounds)
    tensors = _weights(count)
    say("digests, with those of blocks and without")
    for name, blocks in {"digests_s": False, "digests_with_blocks_s": True}.items():
        results[name] = median_s(_digests(tensors, blocks), rounds)
    try:
        with _apart():
            results |= lent.measure(_LINKED_LAYERS, rounds, say)
    except HostsUnavailable as exc:
        say(f"no slow link: {exc}")
    return results


@contextmanager
def _apart() -> Iterator[None]:
    """Processes do not read each other's memory."""
    os.environ["ENGINES_SOCKET_SAME_HOST"] = "0"
    try:
        yield
    finally:
        del os.environ["ENGINES_SOCKET_SAME_HOST"]


def _weights(count: int) -> dict[str, torch.Tensor]:
    """Equal in each process."""
    generator = torch.Generator().manual_seed(7)
    words = torch.randint(1 << 60, (count, _LAYER_NBYTES // 8), generator=generator)
    return {f"layer.{number}": layer for number, layer in enumerate(words)}


def serve(endpoint: str, protocol: str, count: str) -> None:
    serving.serve(endpoint, protocol, _weights(int(count)), protocol=protocol, digests=True)


def _digests(tensors: Mapping[str, torch.Tensor], blocks: bool) -> Callable[[], object]:
    return lambda: digests_of(tensors, "xxh3_128", blocks=blocks)


def _loads(registry: Registry, protocol: str, count: int, rounds: int) -> Results:
    tensors = _weights(count)
    full: list[LoadReport] = []
    reused: dict[int, list[LoadReport]] = {percent: [] for percent in _PERCENT}
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(HOST, protocol))
        for number in range(rounds + 1):
            for percent in (None, *_PERCENT):
                _differ(tensors, percent or 0)
                chosen = LoadOptions(reuse=percent is not None)
                report = load(registry, engine, protocol, rank=0, tensors=tensors, options=chosen)
                if number:  # the first round opens connections
                    (full if percent is None else reused[percent]).append(report)
    results: Results = {f"{protocol}_full_s": statistics.median(one.seconds for one in full)}
    for percent, reports in reused.items():
        name = f"{protocol}_{percent}_percent"
        ratios = [one.seconds / base.seconds for one, base in zip(reports, full, strict=True)]
        brought = [sum(share.nbytes for share in one.shares) / one.nbytes for one in reports]
        results[f"{name}_s"] = statistics.median(one.seconds for one in reports)
        results[f"{name}_to_full"] = statistics.median(ratios)
        results[f"{name}_bytes_to_full"] = statistics.median(brought)
    return results


def _differ(tensors: Mapping[str, torch.Tensor], percent: int) -> None:
    """So many blocks of all differ from those of the source, in one word each."""
    blocks = [block for tensor in tensors.values() for block in tensor.split(_BLOCK_NBYTES // 8)]
    for number in torch.randperm(len(blocks))[: len(blocks) * percent // 100].tolist():
        blocks[number][number] ^= 1


@options.program
@options.gib(0.5, "Size of the weights.")
@options.rounds(5)
def command(gib: float, rounds: int, as_json: bool) -> None:
    """Loads of what is mostly elsewhere, or here, already. Takes two minutes."""
    with engine_log():
        figures.report(measure(gib, rounds, figures.say), as_json)


if __name__ == "__main__":
    main(command, "benchmarks.reuse")
