"""Whole loads in other processes: what a source does, and a process that only loads. Time is taken
by `Target` alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import click
import torch

from benchmarks import serving
from benchmarks.gpu.rows import COLD, WARM, Row, Target, reads_of
from benchmarks.gpu.sets import SETS, Layout, allocate, filled, nbytes_of
from benchmarks.processes import another_process
from benchmarks.serving import HOST
from engine_loader import LoadReport, load, open_engine
from engine_registry import Registry

MODULE = "benchmarks.gpu.loads"


@dataclass(frozen=True)
class Place:
    """A set of tensors on a device, and how to reach it there."""

    tensor_set: str
    scale: float
    device: str
    protocol: str

    @property
    def layout(self) -> Layout:
        return SETS[self.tensor_set](self.scale)

    @property
    def args(self) -> tuple[str, ...]:
        return self.tensor_set, str(self.scale), self.device, self.protocol

    @classmethod
    def of(cls, tensor_set: str, scale: str, device: str, protocol: str) -> Place:
        return cls(tensor_set, float(scale), device, protocol)

    @property
    def instance(self) -> str:
        """Of the source of the set over the protocol."""
        return f"{self.tensor_set}.{self.protocol}"


def serve(endpoint: str, instance: str, *place: str) -> None:
    here = Place.of(*place)
    use(here.device)
    tensors = filled(here.layout, here.device)
    serving.serve(endpoint, instance, tensors, protocol=here.protocol, digests=True)


def load_first(endpoint: str, instance: str, rounds: str, *place: str) -> None:
    """The first load of a process, and those after it.

    Before it, it has used its GPU, connected to etcd and started an engine.
    """
    with _loader(endpoint, instance, *place) as (target, once):
        took = [target.time(COLD, once) for _ in range(1 + int(rounds))]
    click.echo(json.dumps([(took_s, one.transfer_s, one.verified) for took_s, one in took]))


def load_again(endpoint: str, instance: str, *place: str) -> None:
    """A load for each line on standard input, and when it began and ended, after one that does not
    count.
    """
    with _loader(endpoint, instance, *place) as (target, once):
        target.time("load() in one of several processes", once)
        click.echo("ready")
        for _ in sys.stdin:
            _, began_and_ended = target.time("load() in one of several processes", _clocked(once))
            click.echo(json.dumps(began_and_ended))


def _clocked(once: Callable[[], object]) -> Callable[[], tuple[float, float]]:
    def run() -> tuple[float, float]:
        began = time.monotonic()  # the same clock in every process of a host
        once()
        return began, time.monotonic()

    return run


@contextmanager
def _loader(
    endpoint: str, instance: str, *place: str
) -> Iterator[tuple[Target, Callable[[], LoadReport]]]:
    here = Place.of(*place)
    use(here.device)
    target = Target(allocate(here.layout, here.device), filled(here.layout, here.device))
    with Registry.connect(endpoint) as registry, open_engine(HOST, here.protocol) as engine:
        registry.instances()
        yield target, lambda: load(registry, engine, instance, rank=0, tensors=target.tensors)


def use(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_device(device)


def cold_and_warm(
    endpoint: str, destinations: Sequence[Place], processes: int, rounds: int
) -> list[Row]:
    """Of processes that do nothing but load: their first loads, and those after the first of the
    last process. The destinations, of one set over several protocols, take turns.
    """
    runs: dict[str, list[list[tuple[float, float, bool]]]] = {}  # of a process: each load
    for _ in range(processes):
        for dst in destinations:
            args = (endpoint, dst.instance, str(rounds), *dst.args)
            with another_process(MODULE, "load_first", *args) as (_, line):
                runs.setdefault(dst.protocol, []).append(json.loads(line))
    rows = []
    for dst in destinations:
        some = runs[dst.protocol]
        rows += _rows(dst, COLD, [run[0] for run in some], "first load of a process")
        rows += _rows(dst, WARM, some[-1][1:], "a process that only loads")
    return rows


def _rows(dst: Place, what: str, took: Sequence[tuple[float, float, bool]], note: str) -> list[Row]:
    nbytes = nbytes_of(dst.layout)
    if all(verified for _, _, verified in took):
        note += ", digests compared"
    return [
        Row(dst.tensor_set, name, nbytes, tuple(samples), says, dst.protocol)
        for name, samples, says in (
            (what, [seconds for seconds, _, _ in took], note),
            (reads_of(what), [reads for _, reads, _ in took], ""),
        )
    ]
