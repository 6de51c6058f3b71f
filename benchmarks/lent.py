"""Loads of a fine-tune from one rank behind a slow link, without and with ranks of its base on fast
links. Used by `python -m benchmarks.reuse`; hosts are network namespaces, see `benchmarks.hosts`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack

import click
import torch

from benchmarks.figures import Results
from benchmarks.hosts import Network, etcd_on
from benchmarks.processes import another_process, answer, order, ready
from engine_cli.options import engine_log
from engine_loader import LoadOptions, PublishOptions, load, open_engine, publish
from engine_registry import ModelIdentity, Registry

_LAYER_NBYTES, _BLOCK_NBYTES = 32 << 20, 1 << 20
_BASE, _TUNED = ModelIdentity("base"), ModelIdentity("base", "tuned")
_RANKS = 4  # of the base
_SLOW_MBIT, _FAST_MBIT = 200.0, 1000.0
READERS = (1, 4)  # that load at the same time


def measure(count: int, rounds: int, say: Callable[[str], None]) -> Results:
    """Of so many layers. HostsUnavailable where there can be no hosts within this machine."""
    results: Results = {}
    with ExitStack() as stack:
        network = stack.enter_context(Network())
        endpoint = stack.enter_context(etcd_on(network.host("control")))
        slow = network.host("new", _SLOW_MBIT)
        bases = [network.host(f"base-{number}", _FAST_MBIT) for number in range(_RANKS)]
        say(f"{count} layers behind a link of {_SLOW_MBIT:g} Mbit/s")
        for host in [slow, *bases]:
            given = (endpoint, host.address, host.name, str(count))
            stack.enter_context(another_process(__name__, "serve", *given, within=host.command))
        readers = []
        for number in range(max(READERS)):
            host = network.host(f"reader-{number}", _FAST_MBIT)
            args = (endpoint, host.address, str(count))
            process, _ = stack.enter_context(
                another_process(__name__, "read", *args, within=host.command)
            )
            readers.append(process)
        for at_once in READERS:
            seconds: dict[str, list[float]] = {"alone": [], "lent": []}
            sent: dict[str, list[float]] = {"alone": [], "lent": []}
            for number in range(rounds + 1):
                for way in seconds:
                    before = slow.sent_nbytes
                    for process in readers[:at_once]:
                        order(process, way)
                    took = [
                        json.loads(answer(process, "a reader")) for process in readers[:at_once]
                    ]
                    if number:  # the first round opens connections
                        seconds[way].append(max(took))
                        sent[way].append((slow.sent_nbytes - before) / (count * _LAYER_NBYTES))
            for way in seconds:
                name = f"slow_link_{at_once}_{way}"
                results[f"{name}_s"] = statistics.median(seconds[way])
                results[f"{name}_sent_to_weights"] = statistics.median(sent[way])
    return results


def _weights(count: int, tuned: bool) -> dict[str, torch.Tensor]:
    """Equal in each process. Of a fine-tune each 50th block differs."""
    generator = torch.Generator().manual_seed(7)
    words = torch.randint(1 << 60, (count, _LAYER_NBYTES // 8), generator=generator)
    if tuned:
        words.view(-1, _BLOCK_NBYTES // 8)[::50, 0] ^= 1
    return {f"layer.{number}": layer for number, layer in enumerate(words)}


def serve(endpoint: str, address: str, name: str, count: str) -> None:
    tuned = name == "new"
    with (
        engine_log(),
        Registry.connect(endpoint) as registry,
        open_engine(address, "socket") as engine,
        publish(
            registry,
            engine,
            instance=name,
            rank=0,
            world_size=1,
            tensors=_weights(int(count), tuned),
            model=_TUNED if tuned else _BASE,
            options=PublishOptions(digests=True),
        ),
    ):
        ready("published")


def read(endpoint: str, address: str, count: str) -> None:
    """Loads at each line on standard input, and prints how many seconds that took."""
    wanted = _weights(int(count), tuned=True)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    with (
        engine_log(),
        Registry.connect(endpoint) as registry,
        open_engine(address, "socket") as engine,
    ):
        click.echo("ready")
        for line in sys.stdin:
            for tensor in tensors.values():
                tensor.zero_()
            options = LoadOptions(
                also_from=_BASE if line == "lent\n" else None, max_sources=1 + _RANKS
            )
            report = load(registry, engine, _TUNED, rank=0, tensors=tensors, options=options)
            if not all(torch.equal(tensors[name], wanted[name]) for name in wanted):
                raise SystemExit("the load brought something else")
            click.echo(json.dumps(report.seconds))
