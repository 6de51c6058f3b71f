"""What of the product is replaced, so that a thousand joins fit into one process and wait for each
other.

- A keeper is the product's `Keeper` in the thread that registers, and no process. It asks etcd for
  the same, over one connection for all, and renews its lease with its first change.
- A load keeps manifests by itself, as in a process that does nothing else.
- Blocks are short, so that a hop in a chain costs what it costs with a large model over RDMA, and a
  source may be silent for long.

A load waits before it contacts its sources. Then it holds its tickets and watches, and no byte has
moved.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

from benchmarks.scale.ranks import a_keeper
from engine_loader import Engine
from engine_loader.engines.nearness import Nearness
from engine_loader.loading import reading
from engine_loader.planning.reads import Span
from engine_loader.sources import manifests
from engine_loader.transfer.pace import Pace, pace_in_chain
from engine_loader.transfer.pipe import Source
from engine_loader.transfer.scheduler import Transfer
from engine_registry import Manifest, RankRecord, RegistrationState, client
from engine_registry.errors import RegistryError
from engine_registry.etcd import channel
from engine_registry.etcd.client import Etcd
from engine_registry.registration.writes import WITHDRAWN
from engine_registry.schema.record import ManifestRef

# by its name, as the package has a function that is called so, too
_LOADING = import_module("engine_loader.loading.load")
_BLOCK_NBYTES = 1 << 10
_PATIENCE_S = 1_800.0
_STACK_NBYTES = 512 << 10  # of which there are thousands
_ON_THE_WAY = 64
_LOOK_S = 10.0
_PINGS_MS = {
    "grpc.keepalive_time_ms": 120_000,
    "grpc.keepalive_timeout_ms": 60_000,
    "grpc.http2.ping_timeout_ms": 60_000,
}
_SWITCH_S = 0.1  # else thousands of threads that wait for the GIL wake up 200 times a second


class _KeptHere:
    """A `Registration` whose keeper is no process."""

    def __init__(
        self,
        etcd: Etcd,
        record: RankRecord,
        parts: Sequence[bytes],
        ttl_s: float,
    ) -> None:
        self.record = record
        self.state = RegistrationState.REGISTERED
        self.lost: RegistryError | None = None
        self.withdrawn = False
        self.keeper_pid = None
        self._keeper = a_keeper(etcd, record, parts, ttl_s)
        self._keeper.register()
        self.record = replace(record, order=self._keeper.order)

    def update(self, **given: Any) -> None:
        changes = {name: value for name, value in given.items() if value is not None}
        self.record = replace(self.record, **changes)
        self._keeper.change(self.record)
        self._keeper.beat()

    def when_claimed_again(self, call: Callable[[], None]) -> None:
        """It never is."""

    def withdraw(self, reason: str = WITHDRAWN) -> None:
        if not self.withdrawn:
            self._keeper.end(reason)
            self.withdrawn, self.state = True, RegistrationState.CLOSED

    close = withdraw


class _KeptByThread(threading.local):
    """The manifests that a load has fetched."""

    def __init__(self) -> None:
        self._manifests: dict[ManifestRef, Manifest] = {}

    def get(self, record: RankRecord) -> Manifest | None:
        return self._manifests.get(record.manifest)

    def put(self, record: RankRecord, manifest: Manifest) -> None:
        self._manifests[record.manifest] = manifest


class Gate:
    """Where loads wait, until all of them are there. So many at once are on their way to it as the
    processors of a machine can bear; the others have not begun.
    """

    def __init__(self, loads: int) -> None:
        self._loads = loads
        self._there = 0
        self.crossings = 0  # loads that read from another zone
        self._failures: list[BaseException] = []
        self._changed = threading.Condition()
        self._open = threading.Event()
        self._on_the_way = threading.BoundedSemaphore(_ON_THE_WAY)

    def begin(self) -> None:
        self._on_the_way.acquire()

    def enter(self, crosses: bool) -> None:
        """Once for each load: one that tries again finds the gate open."""
        if self._open.is_set():
            return
        with self._changed:
            self._there += 1
            self.crossings += crosses
            self._changed.notify_all()
        self._on_the_way.release()
        self._open.wait(_PATIENCE_S)

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._failures.append(error)
            self._changed.notify_all()

    def wait_for_all(self, timeout_s: float) -> None:
        """Raises the first error of a load that will not come."""
        with self._changed:
            came = self._changed.wait_for(
                lambda: self._failures or self._there == self._loads, timeout_s
            )
            if self._failures:
                raise self._failures[0]
            if not came:
                raise TimeoutError(
                    f"{self._there} of {self._loads} loads have joined in {timeout_s:.0f} s"
                )

    def open(self) -> None:
        self._open.set()


class _GatedTransfer(Transfer):
    """Waits before it begins to read."""

    def __init__(
        self,
        gate: Gate,
        engine: Engine,
        spans: Iterable[Span],
        sources: Sequence[Source],
        *more: Any,
    ) -> None:
        super().__init__(engine, spans, sources, *more)
        self._gate = gate
        self._crosses = any(source.near is Nearness.ELSEWHERE for source in sources)

    def run(self) -> None:
        self._gate.enter(self._crosses)
        super().run()


@contextmanager
def held_by(gate: Gate) -> Iterator[None]:
    """Inside, loads wait at the gate when they hold their tickets and watch their sources."""
    with mock.patch.object(reading, "Transfer", partial(_GatedTransfer, gate)):
        yield


@contextmanager
def in_one_process(etcd: Etcd) -> Iterator[None]:
    """Inside, a thousand loads that publish fit into this process. `etcd` is what their keepers
    use.
    """

    def kept_here(
        config: object, record: RankRecord, parts: Sequence[bytes], ttl_s: float, *_: object
    ) -> _KeptHere:
        return _KeptHere(etcd, record, parts, ttl_s)

    with (
        many_threads(),
        mock.patch.object(client, "Registration", kept_here),
        mock.patch.object(manifests, "_KEPT", _KeptByThread()),
        mock.patch.object(_LOADING, "pace_in_chain", _short_and_patient),
    ):
        yield


@contextmanager
def many_threads() -> Iterator[None]:
    """Inside, thousands of threads and connections wait at little cost, and may be late: gRPC's
    readers wake up ten times a second else, and a ping that is not answered in time ends a
    connection.
    """
    options = tuple((name, _PINGS_MS.get(name, value)) for name, value in channel.CHANNEL_OPTIONS)
    stack_nbytes, switch_s = threading.stack_size(_STACK_NBYTES), sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        with (
            mock.patch.object(import_module("grpc._common"), "MAXIMUM_WAIT_TIMEOUT", _LOOK_S),
            mock.patch.object(channel, "CHANNEL_OPTIONS", options),
        ):
            yield
    finally:
        threading.stack_size(stack_nbytes)
        sys.setswitchinterval(switch_s)


def _short_and_patient(pace: Pace, nbytes: int) -> Pace:
    return replace(
        pace_in_chain(pace, nbytes),
        chunk_nbytes=_BLOCK_NBYTES,
        nap_s=(1e-3, 0.02),
        stall_s=_PATIENCE_S,
        patience_s=_PATIENCE_S,
        starve_s=_PATIENCE_S,
    )
