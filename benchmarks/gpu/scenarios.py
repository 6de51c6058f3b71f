"""Loads that take more than two processes: a source that is killed, several sources, several
destinations.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import time
from typing import Any

from benchmarks.gpu.loads import MODULE, Place, use
from benchmarks.gpu.rows import Row, Target
from benchmarks.gpu.sets import allocate, filled, nbytes_of
from benchmarks.processes import answer, order, several_processes
from benchmarks.serving import HOST
from engine_loader import Engine, LoadOptions, LoadReport, Progress, load, open_engine
from engine_registry import Registry

_GONE_S = 20.0


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
    names = [f"{letter}.{dst.protocol}" for letter in "ab"]
    for _ in range(rounds):
        calls = [(endpoint, name, *place.args) for name, place in zip(names, sources, strict=True)]
        with (
            several_processes(MODULE, "serve", calls) as ((victim, _), _),
            open_engine(HOST, dst.protocol) as engine,
        ):

            def once(progress: Any = None, engine: Engine = engine) -> tuple[float, LoadReport]:
                def fill() -> LoadReport:
                    return load(
                        registry,
                        engine,
                        names,
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
    where = f"{' and '.join(place.device for place in sources)} → {dst.device}"
    parts = {
        "2 sources": ([took for took, _ in both], where),
        "2 sources: its reads": ([report.transfer_s for _, report in both], ""),
        "one SIGKILLed at the first bytes": (killed, "every byte as it should be"),
        "longest load until it is gone from etcd": (
            longest,
            f"adds {adds:.1f} ms; {dropped} loads of {rounds} kills went on without it",
        ),
    }
    return [
        Row("failover", what, target.nbytes, tuple(took), note, dst.protocol)
        for what, (took, note) in parts.items()
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
    name = f"one.{src.protocol}"
    with several_processes(MODULE, "serve", [(endpoint, name, *src.args)]):
        calls = [(endpoint, name, *place.args) for place in destinations]
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
            src.protocol,
        )
    ]
