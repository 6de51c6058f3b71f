"""A link of the chain of `engines demo --keep`: a process that loads the ranks of the demo again
and again, and passes on what it has while it loads.

The loads are real. `Throttle` holds them up, so that they take long enough to be watched. `fleet`
starts the process, which starts a thread for each rank, and one that reads standard input. It ends
when that closes, and when it is asked to.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from engine_cli import logs
from engine_cli.demo.engines import INSTANCE, RANKS
from engine_cli.options import engine_log
from engine_cli.signals import on_ending
from engine_registry import Registry
from engine_registry.errors import EngineRegistryError
from engine_registry.telemetry.logs import fields

if TYPE_CHECKING:
    from engine_loader import MooncakeEngine, Progress

log = logging.getLogger(__name__)
LOAD_S = 30.0
_DRAIN_S = 2 * LOAD_S  # a reader that began at the very end is not cut off
_WAIT_S = 10.0
_AGAIN_S = 1.0
_HALT_S = 1.0  # at most: a source that brings nothing for longer counts as silent


class Throttle:
    """The progress of a load, which it holds up so that all of it takes so many seconds."""

    def __init__(self, seconds: float, stop: threading.Event) -> None:
        self._seconds = seconds
        self._stop = stop
        self._began = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        due = self._began + self._seconds * progress.nbytes / progress.total_nbytes
        self._stop.wait(min(max(0.0, due - time.monotonic()), _HALT_S))


def load_again_and_again(
    name: str, rank: int, endpoint: str, stop: threading.Event, seconds: float = LOAD_S
) -> None:
    """Loads the rank of the demo as one of the instance `name`, until `stop` is set."""
    from engine_loader import MooncakeEngine

    with Registry.connect(endpoint) as registry, MooncakeEngine("127.0.0.1") as engine:
        while not stop.is_set():
            try:
                _load(registry, engine, name, rank, stop, seconds)
            except EngineRegistryError as exc:
                if not stop.wait(_AGAIN_S):
                    log.warning(
                        "%s/%d loads again: %s",
                        name,
                        rank,
                        exc,
                        extra=fields("demo_loads_again", error=exc),
                    )


def _load(
    registry: Registry,
    engine: MooncakeEngine,
    name: str,
    rank: int,
    stop: threading.Event,
    seconds: float,
) -> None:
    from engine_loader import LoadOptions, Replica
    from engine_loader.loading.rank_file import copy_rank
    from engine_loader.transfer.pace import Pace

    due = time.monotonic() + seconds
    report = copy_rank(
        registry,
        engine,
        INSTANCE,
        registry.resolve(INSTANCE, _WAIT_S),
        rank,
        None,
        timeout_s=_WAIT_S,
        publish=Replica(name),
        options=LoadOptions(
            progress=Throttle(seconds, stop),
            # little on its way, so that halts count; and the others halt, too
            pace=Pace(chunk_nbytes=4 << 20, depth=2, starve_s=LOAD_S),
            cancel=stop,
        ),
    )
    stop.wait(max(0.0, due - time.monotonic()))  # weights of a few chunks have come long before
    if report.publication is not None:
        with report.publication as publication:
            if not stop.is_set():
                publication.drain(_DRAIN_S)


def main() -> None:
    name, endpoint = sys.argv[1:]
    stop = threading.Event()
    logs.begin()
    on_ending(stop.set)

    def read() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        stop.set()

    threading.Thread(target=read, name="standard input", daemon=True).start()
    with engine_log():
        threads = [
            threading.Thread(target=load_again_and_again, args=(name, rank, endpoint, stop))
            for rank in range(RANKS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
