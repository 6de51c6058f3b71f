"""Sources that are killed at a random moment within a load.

Each is in a separate process, and several are started at once. Every second one is killed within
the first load from it, when its memory is not mapped yet, the others within a later one.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence

import click
import torch

from benchmarks import serving
from benchmarks.gpu.loads import Place, use
from benchmarks.gpu.rows import Add, Row, Target
from benchmarks.gpu.sets import allocate, filled, nbytes_of
from benchmarks.processes import order, several_processes
from benchmarks.serving import HOST
from engine_loader import Engine, LoadReport, Publication, load, open_engine
from engine_registry import Registry
from engine_registry.errors import EngineRegistryError

GROUP = "kills"
EXACT, OVER = "exact", "exact, over before the kill"
OUTLIVED = "exact, from a source that had ended (LoadReport.outlived)"
WRONG, UNTYPED = "wrong bytes", "errors that are not ours"
DEAD, HELD = "dead contexts", "sources whose memory was not free in time"

_MODULE = "benchmarks.gpu.kills"
_AT_ONCE = 10  # sources; with 4.3 GB each they fit on a GPU of 80 GB
_FREE_S = 10.0
_LOOK_S = 0.01
_READY_S = 1.0
_ENDS_S = 30.0


def serve_until_killed(endpoint: str, instance: str, *place: str) -> None:
    """Kills itself at the moment that a line on standard input says."""
    here = Place.of(*place)
    use(here.device)
    serving.serve(
        endpoint,
        instance,
        filled(here.layout, here.device),
        protocol=here.protocol,
        digests=True,
        meanwhile=_die_when_told,
    )


def _die_when_told(_: Publication) -> None:
    click.echo("published")
    for line in sys.stdin:
        time.sleep(max(0.0, float(line) - time.monotonic()))  # one clock for the whole host
        os.kill(os.getpid(), signal.SIGKILL)


def kills(endpoint: str, registry: Registry, src: Place, dst: Place, count: int, add: Add) -> None:
    """Adds rows, and how often each thing happened, also of what came before an error."""
    use(dst.device)
    with open_engine(HOST, dst.protocol) as engine:
        trial = Kills(registry, engine, src, dst)
        try:
            for start in range(0, count, _AT_ONCE):
                numbers = range(start, min(start + _AT_ONCE, count))
                _kill_all(endpoint, [f"killed-{number}" for number in numbers], src, trial)
                if trial.counts[DEAD]:
                    break
        finally:
            add(trial.rows(), trial.outcomes())


def _kill_all(endpoint: str, names: Sequence[str], src: Place, trial: Kills) -> None:
    free = _free_nbytes(src.device)
    calls = [(endpoint, name, *src.args) for name in names]
    with several_processes(_MODULE, "serve_until_killed", calls) as sources:
        for name, (process, _) in zip(names, sources, strict=True):
            trial.kill(name, process)
            if trial.counts[DEAD]:
                return
    trial.left.append(free - _free_nbytes(src.device))


class Kills:
    """Loads from sources that are killed, one after the other."""

    def __init__(self, registry: Registry, engine: Engine, src: Place, dst: Place) -> None:
        self._registry = registry
        self._engine = engine
        self._src = src
        self._dst = dst
        self._target = Target(allocate(dst.layout, dst.device), filled(dst.layout, dst.device))
        self._moments = random.Random()  # noqa: S311  no secret
        self._takes_s = {False: 0.0, True: 0.0}  # a load, by whether it is the first from a source
        self._killed = 0
        self._loads_s: list[float] = []
        self._freed_s: list[float] = []
        self.left: list[int] = []  # bytes of the source's GPU that the sources of a start have kept
        self.counts: Counter[str] = Counter()

    def kill(self, name: str, process: subprocess.Popen[str]) -> None:
        first = self._killed % 2 == 1
        self._killed += 1
        if not first:
            for kind in (True, False):
                self._takes_s[kind], _ = self._target.time(name, lambda: self._load(name))
        free = _free_nbytes(self._src.device)
        self._target.poison()
        began = time.monotonic()
        at = began + self._moments.uniform(0, self._takes_s[first])
        order(process, str(at))
        self.counts[self._outcome(name, began, at)] += 1
        if not self._lives():
            self.counts[DEAD] += 1
            return
        process.wait(_ENDS_S)
        self._wait_until_free(at, free + nbytes_of(self._src.layout))

    def _load(self, name: str) -> LoadReport:
        return load(
            self._registry,
            self._engine,
            name,
            rank=0,
            tensors=self._target.tensors,
            timeout_s=_READY_S,
        )

    def _outcome(self, name: str, began: float, at: float) -> str:
        try:
            report = self._load(name)
            took = time.monotonic() - began
            if self._target.wrong():
                return WRONG
        except EngineRegistryError as exc:
            return type(exc).__name__
        except Exception as exc:  # noqa: BLE001  it is counted, and said
            click.echo(f"{name}: {type(exc).__name__}: {exc}", err=True)
            return UNTYPED
        self._loads_s.append(took)
        if report.outlived:
            return OUTLIVED
        return EXACT if began + took > at else OVER

    def _lives(self) -> bool:
        """Whether this process can still use its GPU."""
        try:
            return int(torch.ones(1024, device=self._dst.device).sum()) == 1024
        except RuntimeError:
            return False

    def _wait_until_free(self, since: float, nbytes: int) -> None:
        if not self._src.device.startswith("cuda"):
            return
        while _free_nbytes(self._src.device) < nbytes:
            if time.monotonic() - since > _FREE_S:
                self.counts[HELD] += 1
                return
            time.sleep(_LOOK_S)
        self._freed_s.append(time.monotonic() - since)

    def outcomes(self) -> dict[str, int]:
        """Those that must not be are there, too."""
        return {
            "kills": self._killed,
            **dict.fromkeys((EXACT, OUTLIVED, OVER, WRONG, UNTYPED, DEAD, HELD), 0),
            **self.counts,
        }

    def rows(self) -> list[Row]:
        left = f"at most {max(self.left) / 1e6:.0f} MB of the GPU's were kept" if self.left else ""
        nbytes = nbytes_of(self._dst.layout)
        rows = [
            self._row("load() while its source is killed, exact", nbytes, self._loads_s, ""),
            self._row("from the kill until the source's memory is free", 0, self._freed_s, left),
        ]
        return [row for row in rows if row.samples_s]

    def _row(self, what: str, nbytes: int, samples: Sequence[float], note: str) -> Row:
        return Row(GROUP, what, nbytes, tuple(samples), note, self._dst.protocol)


def _free_nbytes(device: str) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else 0
