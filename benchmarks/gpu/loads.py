"""Whole loads: what a source process, and a process that loads for the first time, do; and the
rounds of this process, in which `load()` takes turns with what moves the same bytes. Time is taken
by `Target` alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click
import torch

from benchmarks import serving
from benchmarks.gpu import rivals
from benchmarks.gpu.phases import functions_of, phases
from benchmarks.gpu.rows import (
    AGAIN,
    ALL_CALL,
    COLD,
    COLD_READS,
    EACH_CALL,
    EACH_COPY,
    FLAT_COPY,
    READS,
    TURN,
    TURN_READS,
    WARM,
    WITH_DIGESTS,
    Row,
    Target,
    in_turns,
)
from benchmarks.gpu.sets import SETS, Layout, allocate, filled, nbytes_of
from benchmarks.processes import another_process
from benchmarks.serving import HOST
from engine_loader import (
    Destination,
    LoadOptions,
    LoadReport,
    MooncakeEngine,
    load,
)
from engine_loader.options import Verify
from engine_registry import Registry

MODULE = "benchmarks.gpu.loads"
_PROFILED = 3


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


# -- other processes
# --------------------------------------------------------------------------------------------------


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
    click.echo(json.dumps([[seconds, report.transfer_s] for seconds, report in took]))


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
    with Registry.connect(endpoint) as registry, MooncakeEngine(HOST, here.protocol) as engine:
        registry.instances()
        yield target, lambda: load(registry, engine, instance, rank=0, tensors=target.tensors)


def use(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_device(device)


# -- a set in this process
# --------------------------------------------------------------------------------------------------


def cold_and_warm(endpoint: str, src: Place, dst: Place, processes: int, rounds: int) -> list[Row]:
    """Of processes that do nothing but load: their first loads, and those after the first of the
    last process.
    """
    runs: list[list[tuple[float, float]]] = []  # of a process: each load, and its reads
    for _ in range(processes):
        with another_process(
            MODULE, "load_first", endpoint, src.tensor_set, str(rounds), *dst.args
        ) as (_, line):
            runs.append(json.loads(line))
    nbytes = nbytes_of(dst.layout)
    first, again = [run[0] for run in runs], runs[-1][1:]
    return [
        Row(
            dst.tensor_set,
            COLD,
            nbytes,
            tuple(took for took, _ in first),
            "first load of a process",
        ),
        Row(dst.tensor_set, COLD_READS, nbytes, tuple(reads for _, reads in first)),
        Row(
            dst.tensor_set,
            WARM,
            nbytes,
            tuple(took for took, _ in again),
            "a process that only loads",
        ),
        Row(dst.tensor_set, READS, nbytes, tuple(reads for _, reads in again)),
    ]


def in_this_process(
    registry: Registry, src: Place, dst: Place, rounds: int, profiled: bool
) -> tuple[list[Row], dict[str, dict[str, float]], list[str]]:
    """Rows; the steps of a load, without digests and with; and, if it is wanted, which functions
    took the time.
    """
    use(dst.device)
    name = dst.tensor_set
    target = Target(allocate(dst.layout, dst.device), filled(dst.layout, dst.device), [src.device])
    reports: list[LoadReport] = []
    with MooncakeEngine(HOST, dst.protocol) as engine:
        destination = Destination(target.tensors)

        def once(verify: Verify) -> LoadReport:
            return load(
                registry,
                engine,
                name,
                rank=0,
                tensors=target.tensors,
                options=LoadOptions(verify=verify),
            )

        def again(verify: Verify = "header") -> LoadReport:
            return load(
                registry,
                engine,
                name,
                rank=0,
                tensors=destination,
                options=LoadOptions(verify=verify),
            )

        def ours(what: str, verify: Verify) -> float:
            took, report = target.time(what, lambda: once(verify))
            if verify == "header":
                reports.append(report)
            return took

        with (
            rivals.copies(src, target) as copies,
            rivals.naive(registry, name, dst.protocol, target) as naive,
        ):
            actions: dict[str, Callable[[], float]] = {
                TURN: lambda: ours(TURN, "header"),
                AGAIN: lambda: target.time(AGAIN, again)[0],
                WITH_DIGESTS: lambda: ours(WITH_DIGESTS, "digest"),
                **copies,
                **naive,
            }
            took = in_turns(actions, rounds)
        steps = {"header": _steps(target, once, "header"), "digest": _steps(target, once, "digest")}
        steps["header, into a Destination"] = _steps(target, again, "header")
        lines = functions_of([lambda: once("header")] * _PROFILED, 25) if profiled else []
    flat = min(target.nbytes, rivals.BLOCK_NBYTES)
    rows = [
        Row(
            name,
            TURN_READS,
            target.nbytes,
            tuple(report.transfer_s for report in reports[1:]),
            f"{reports[-1].reads} reads",
        )
    ]
    rows += [
        Row(name, what, flat if what == FLAT_COPY else target.nbytes, tuple(some))
        for what, some in took.items()
    ]
    order = [TURN, AGAIN, TURN_READS, WITH_DIGESTS, EACH_CALL, ALL_CALL, EACH_COPY, FLAT_COPY]
    return sorted(rows, key=lambda row: order.index(row.what)), steps, lines


def _steps(
    target: Target, once: Callable[[Verify], LoadReport], verify: Verify
) -> dict[str, float]:
    with phases() as found:

        def in_steps() -> None:
            found.call(lambda: once(verify))

        for _ in range(_PROFILED):
            target.time(f"load() in steps, {verify}", in_steps)
    return found.medians()
