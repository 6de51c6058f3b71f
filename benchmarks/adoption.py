"""`python -m benchmarks.adoption`: a process with weights is killed, and a new one adopts them.

Medians of several rounds. Each round starts a process, which adopts what the one before it has left
with its keeper, publishes it again, and is killed. The weights are layers of 32 MiB in an arena, on
the host or on a GPU. Seconds are counted from the moment at which the process is started.

| figure | until |
|---|---|
| `import_s` | Python runs, and torch and all of ours are imported |
| `device_s` | the GPU is in use; on the host nothing |
| `verified_s` | the tensors lie in the memory, and digests have proven them |
| `published_s` | peers can read them |

`map_s` is what it takes to take the memory from the keeper and to map it, and `adopt_s` all of
`adopt`, with what it reads in etcd and with the digests. `memory_to_weights` is what the memory of
the host that is this process's alone has grown by meanwhile.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import click
import torch

from benchmarks import figures, options
from benchmarks.figures import Results
from benchmarks.left import keepers_end, killed, wait_until_held
from benchmarks.serving import HOST, MODEL
from engine_cli.main import main
from engine_loader import Arena, PublishOptions, adopt, find_held, open_engine, publish
from engine_loader.adopting.memory import OpenedRank
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd
from engine_registry.registration.held import take

_LAYER_NBYTES = 32 << 20
_OPTIONS = PublishOptions(hold_s=60)
_KEY = "/engines/adoption/0"
_MODULE = __name__ if __name__ != "__main__" else "benchmarks.adoption"


def measure(gib: float, rounds: int, device: str, say: Callable[[str], None]) -> Results:
    count = str(max(1, round(gib * (1 << 30) / _LAYER_NBYTES)))
    found: list[Results] = []
    with LocalEtcd() as local, keepers_end(_KEY):
        say(f"{count} layers on {device}")
        with killed(_MODULE, "first", local.endpoint, device, count):
            pass
        wait_until_held(_KEY)
        for _ in range(rounds + 1):
            began = str(time.monotonic())
            with killed(_MODULE, "again", local.endpoint, device, count, began) as line:
                found.append(json.loads(line))
            wait_until_held(_KEY)
    del found[0]  # files are in the page cache from here on
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def _layers(count: str) -> list[str]:
    return [f"layer.{number}" for number in range(int(count))]


def first(endpoint: str, device: str, count: str) -> None:
    """A process that makes the weights and publishes them."""
    with Arena(device, int(count) * _LAYER_NBYTES) as arena:
        tensors = {
            name: arena.empty((_LAYER_NBYTES // 8,), torch.int64).random_()
            for name in _layers(count)
        }
    with Registry.connect(endpoint) as registry, open_engine(HOST, _protocol(device)) as engine:
        with publish(
            registry,
            engine,
            instance="adoption",
            rank=0,
            world_size=1,
            tensors=tensors,
            model=MODEL,
            options=_OPTIONS,
        ):
            click.echo("published")
            sys.stdin.read()


def again(endpoint: str, device: str, count: str, began: str) -> None:
    """A process that adopts them, and publishes them again."""
    since = float(began)
    times = {"import_s": time.monotonic() - since}
    if device != "cpu":
        torch.zeros(1, device=device)
    times["device_s"] = time.monotonic() - since
    tensors = {
        name: torch.empty(_LAYER_NBYTES // 8, dtype=torch.int64, device="meta")
        for name in _layers(count)
    }
    with Registry.connect(endpoint) as registry:
        held = find_held(registry, MODEL, rank=0, world_size=1)
        if held is None:
            raise click.ClickException("nothing is held")
        start = time.monotonic()
        with take(held.place):
            OpenedRank(held, shared=False)
        times["map_s"] = time.monotonic() - start
        since += time.monotonic() - start  # a start has no such part
        before = figures.memory_nbytes(os.getpid(), "RssAnon")
        adopted = adopt(registry, MODEL, tensors, rank=0, world_size=1)
        more = figures.memory_nbytes(os.getpid(), "RssAnon") - before
        times["memory_to_weights"] = more / (int(count) * _LAYER_NBYTES)
        if adopted is None or not adopted.verified:
            raise click.ClickException("nothing was adopted")
        times["verified_s"] = time.monotonic() - since
        times["adopt_s"] = adopted.seconds
        times["verified_to_import"] = times["verified_s"] / times["import_s"]
        with (
            open_engine(HOST, _protocol(device)) as engine,
            adopted.publish(registry, engine, instance="adoption", options=_OPTIONS),
        ):
            times["published_s"] = time.monotonic() - since
            click.echo(json.dumps(times))
            sys.stdin.read()


def _protocol(device: str) -> str:
    return "socket" if device == "cpu" else "cuda_ipc"


@options.program
@options.gib(1.0, "Size of the weights.")
@options.rounds(5)
@options.option("--device", default="cpu", help="cpu, or a GPU such as cuda:0.")
def command(gib: float, rounds: int, device: str, as_json: bool) -> None:
    """A new process has the weights of one that was killed. Takes a minute."""
    figures.report(measure(gib, rounds, device, figures.say), as_json)


if __name__ == "__main__":
    main(command, "benchmarks.adoption")
