"""Loads that join a model at the same time, each with an engine, in threads of this process.

Each is one `load(…, publish=Replica(…))`. All of them have registered, chosen their sources and
taken their tickets before one moves its first byte.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from benchmarks.scale.counts import Counts, counting
from benchmarks.scale.ranks import MODEL, TIMEOUT_S, connected
from benchmarks.scale.seams import Gate, held_by, in_one_process
from engine_loader import (
    Engine,
    InProcessEngine,
    LoadOptions,
    LoadReport,
    PublishOptions,
    Replica,
    Shard,
    load,
    publish,
)
from engine_loader.errors import LoaderError
from engine_loader.tensors.destination import Destination
from engine_registry import Manifest, Registry
from engine_registry.etcd.local import LocalEtcd

FLOATS = 16_384  # of the one tensor
_TTL_S = 3_600.0
_QUIET_WITHIN_S = 30.0


def weights() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(FLOATS, dtype=torch.float32)}


def manifest_of(shards: Mapping[str, Shard] | None = None, floats: int = FLOATS) -> Manifest:
    """Of such weights, or of a part of them."""
    return Destination({"w": torch.zeros(floats)}, shards).manifest


def load_and_publish(
    registry: Registry,
    engine: Engine,
    instance: str,
    tensors: Mapping[str, torch.Tensor],
    shards: Mapping[str, Shard] | None,
    cancel: threading.Event,
) -> LoadReport:
    """What a join is."""
    return load(
        registry,
        engine,
        MODEL,
        rank=0,
        tensors=tensors,
        shards=shards,
        timeout_s=TIMEOUT_S,
        publish=Replica(instance, options=PublishOptions(ttl_s=_TTL_S)),
        options=LoadOptions(cancel=cancel),
    )


@dataclass(frozen=True)
class Joins:
    """What `joiners` loads have cost until their first byte, and from then until they had all."""

    joiners: int
    spent: Counts
    after: Counts | None  # None where they were cancelled
    most_readers: int  # of one rank
    crossings: int  # joiners that read from another zone
    cpu_s: float  # of this process, until the first byte
    seconds: float
    exact: int  # joiners that have the bytes of the source

    @property
    def requests_each(self) -> float:
        return self.spent.requests / self.joiners

    @property
    def kb_each(self) -> float:
        return self.spent.sent_nbytes / 1e3 / self.joiners


@contextmanager
def a_source(server: LocalEtcd, zone: str = "") -> Iterator[None]:
    """One complete rank of the model, in this process."""
    with (
        connected(server) as etcd,
        in_one_process(etcd),
        Registry.connect(server.endpoint, timeout_s=TIMEOUT_S) as registry,
        publish(
            registry,
            InProcessEngine(location=zone),
            instance="source",
            rank=0,
            world_size=1,
            tensors=weights(),
            model=MODEL,
            options=PublishOptions(ttl_s=_TTL_S),
        ),
    ):
        yield


def join(
    server: LocalEtcd,
    joiners: int,
    *,
    complete: bool = True,
    shards: Mapping[str, Shard] | None = None,
    zones: Sequence[str] = ("",),
    within_s: float = 1_800.0,
) -> Joins:
    """Not `complete`: they are cancelled before their first byte, as records without memory behind
    them may be their sources. They stand in the zones in turn, and the source in the first one.
    """
    with connected(server) as etcd, in_one_process(etcd), ExitStack() as stack:
        team = _Team(server, joiners, shards, zones, stack)
        stack.enter_context(held_by(team.gate))
        with counting(server, _QUIET_WITHIN_S) as joined:
            cpu_s, start = time.process_time(), time.monotonic()
            team.start()
            stack.callback(team.cancel)  # before the connections are closed
            team.gate.wait_for_all(within_s)
            cpu_s, seconds = time.process_time() - cpu_s, time.monotonic() - start
        with Registry.connect(server.endpoint, timeout_s=TIMEOUT_S) as registry:
            readers = Counter((pull.instance, pull.rank) for pull in registry.all_pulls())
        after = None
        if complete:
            with counting(server) as completed:
                team.gate.open()
                team.wait(within_s)
            after = completed.spent
        return Joins(
            joiners,
            joined.spent,
            after,
            max(readers.values()),
            team.gate.crossings,
            cpu_s,
            seconds,
            team.exact(),
        )


class _Team:
    """Starts a thread for each load."""

    def __init__(
        self,
        server: LocalEtcd,
        joiners: int,
        shards: Mapping[str, Shard] | None,
        zones: Sequence[str],
        stack: ExitStack,
    ) -> None:
        self.gate = Gate(joiners)
        self._cancelled = threading.Event()
        self._shards = shards
        self._engines = [
            InProcessEngine(location=zones[number % len(zones)]) for number in range(joiners)
        ]
        self._tensors = [{"w": torch.zeros(FLOATS)} for _ in range(joiners)]
        self._reports: list[LoadReport] = []
        self._registry = stack.enter_context(Registry.connect(server.endpoint, timeout_s=TIMEOUT_S))
        self._threads = [
            threading.Thread(target=self._load, args=(number,), name=f"joiner {number}")
            for number in range(joiners)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            raise TimeoutError(f"loads are not complete after {timeout_s:.0f} s")
        self.gate.wait_for_all(0.0)  # raises what a load has raised

    def cancel(self) -> None:
        """Loads that are complete are closed, the others end."""
        self._cancelled.set()
        self.gate.open()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for report in self._reports:
            if report.publication is not None:
                report.publication.close()

    def exact(self) -> int:
        source = weights()["w"]
        return sum(bool(torch.equal(tensors["w"], source)) for tensors in self._tensors)

    def _load(self, number: int) -> None:
        self.gate.begin()
        try:
            report = load_and_publish(
                self._registry,
                self._engines[number],
                f"joiner-{number:05}",
                self._tensors[number],
                self._shards,
                self._cancelled,
            )
        except LoaderError as exc:
            if not self._cancelled.is_set():
                self.gate.fail(exc)
        except BaseException as exc:  # noqa: BLE001  the thread that waits at the gate raises it
            self.gate.fail(exc)
        else:
            self._reports.append(report)
