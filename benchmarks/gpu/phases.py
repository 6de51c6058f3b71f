"""Where the time of `load()` goes: its steps, timed from outside, and the functions that take most
of it.
"""

from __future__ import annotations

import cProfile
import functools
import importlib
import io
import pstats
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

REST = "the rest"
# What is timed, as what, in the order in which it happens. A step that calls another is
# reported without it.
STEPS: tuple[tuple[str, str, str], ...] = (
    ("describe tensors", "engine_loader.tensors.destination", "Destination.__init__"),
    ("lend memory", "engine_loader.loading.load", "lend"),
    ("wait for devices", "engine_loader.loading.load", "wait_for"),
    ("find sources", "engine_loader.sources.search", "Search.find"),
    ("choose sources", "engine_loader.sources.selection", "Selection.choose"),
    ("fetch manifests", "engine_loader.loading.finder", "find_manifests"),
    ("compare manifests", "engine_loader.planning.plan", "Planner.differences"),
    ("tickets and watches", "engine_loader.sources.entrance", "Entrance.enter"),
    ("plan", "engine_loader.planning.plan", "Planner.plan"),
    ("prepare digests", "engine_loader.sources.digest_check", "DigestCheck.__init__"),
    ("staging buffers", "engine_loader.transfer.staging", "Staging.__init__"),
    ("prepare reads", "engine_loader.transfer.scheduler", "Transfer.__init__"),
    ("open handles", "engine_loader.engines.cuda_ipc.sources", "MappedSource.open"),
    ("launch the kernel", "engine_loader.engines.cuda_ipc.gpus", "CudaGpus.launch"),
    ("start reads", "engine_loader.transfer.scheduler", "Transfer.start"),
    ("reads and checks", "engine_loader.transfer.scheduler", "Transfer.run"),
    ("still registered?", "engine_loader.sources.source", "SourceRank.is_registered"),
    ("compare digests", "engine_loader.sources.digest_check", "DigestCheck.compare"),
    ("give tickets back", "engine_registry.pulls.ticket", "PullTicket.close"),
    ("stop watches", "engine_registry.watching.watch", "Watch.stop"),
)


class Phases:
    """The seconds of each step, of one call after another, in the thread that made this."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._inner: list[float] = []  # for each step that is going on: what steps within it took
        self._now: dict[str, float] = {}
        self.calls: list[dict[str, float]] = []

    def call(self, action: Callable[[], Any]) -> None:
        self._now = dict.fromkeys((name for name, _, _ in STEPS), 0.0)
        start = time.perf_counter()
        action()
        took = time.perf_counter() - start
        self.calls.append({**self._now, REST: took - sum(self._now.values())})

    def medians(self) -> dict[str, float]:
        """Of the steps that took any time."""
        found = {
            name: statistics.median(call[name] for call in self.calls) for name in self.calls[0]
        }
        return {name: seconds for name, seconds in found.items() if seconds}

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def step(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return work(*args, **kwargs)
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self._now[name] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return step


@contextmanager
def phases() -> Iterator[Phases]:
    """Times the steps of every `load()` in this process until the block ends.

    A step that is not there any more is left out.
    """
    found = Phases()
    with ExitStack() as undo:
        for name, module, path in STEPS:
            owner, attribute, work = _find(module, path)
            if work is not None:
                setattr(owner, attribute, found.timed(name, work))
                undo.callback(setattr, owner, attribute, work)
        yield found


def missing_steps() -> list[str]:
    return [f"{module}.{path}" for _, module, path in STEPS if _find(module, path)[2] is None]


def _find(module: str, path: str) -> tuple[Any, str, Any]:
    owner: Any = importlib.import_module(module)
    *outer, attribute = path.split(".")
    for name in outer:
        owner = getattr(owner, name, None)
    return owner, attribute, getattr(owner, attribute, None)


def functions_of(actions: Sequence[Callable[[], Any]], count: int) -> list[str]:
    """The functions that took most time themselves, as lines; profiling makes short functions
    look longer than they are.
    """
    profile = cProfile.Profile()
    profile.enable()
    for action in actions:
        action()
    profile.disable()
    out = io.StringIO()
    pstats.Stats(profile, stream=out).strip_dirs().sort_stats("tottime").print_stats(count)
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]
