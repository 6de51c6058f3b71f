"""How a thousand joins fit into one process: three parts of the product are replaced, and nothing
else.

- A keeper is the product's `Keeper` in the thread that registers, and no process. It asks etcd for
  the same, over one connection for all, and renews its lease once.
- A load keeps manifests by itself, as in a process that does nothing else.
- Blocks are short, so that a hop in a chain costs what it costs with a large model over RDMA, and a
  source may be silent for long.

An engine waits before its first contact with a source. Then the load holds its tickets and watches,
and no byte has moved.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

from engine_loader import InProcessEngine
from engine_loader.sources import manifests
from engine_loader.transfer.pace import Pace, pace_in_chain
from engine_registry import Manifest, RankRecord, RegistrationState, client
from engine_registry.errors import RegistryError
from engine_registry.etcd.client import Etcd
from engine_registry.registration.keeper.holder import Keeper
from engine_registry.registration.writes import WITHDRAWN
from engine_registry.schema.record import ManifestRef

# by its name, as the package has a function that is called so, too
_LOADING = import_module("engine_loader.loading.load")
_BLOCK_NBYTES = 1 << 10
_PATIENCE_S = 1_800.0
_NAPS_S = 1_000  # of all loads, in a second


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
        self.keeper_pid = 0
        self._keeper = Keeper(etcd, record, parts, ttl_s, lambda report: None)
        self._keeper.register()
        self._keeper.beat()

    def update(self, **given: Any) -> None:
        changes = {name: value for name, value in given.items() if value is not None}
        self.record = replace(self.record, **changes)
        self._keeper.change(self.record)
        self._keeper.beat()

    def withdraw(self, reason: str = WITHDRAWN) -> None:
        if not self.withdrawn:
            self._keeper.end(reason)
            self.withdrawn, self.state = True, RegistrationState.CLOSED

    close = withdraw


class _KeptByThread(threading.local):
    """The manifests that a load has fetched."""

    def __init__(self) -> None:
        self._manifests: dict[ManifestRef, Manifest] = {}

    def get(self, ref: ManifestRef) -> Manifest | None:
        return self._manifests.get(ref)

    def put(self, ref: ManifestRef, manifest: Manifest) -> None:
        self._manifests[ref] = manifest


@contextmanager
def in_one_process(etcd: Etcd, loads: int = 1) -> Iterator[None]:
    """Inside, loads that publish run as the module says. `etcd` is what the keepers use. The more
    loads there are, the less often each of them looks whether something has come.
    """

    def kept_here(
        config: object, record: RankRecord, parts: Sequence[bytes], ttl_s: float, *_: object
    ) -> _KeptHere:
        return _KeptHere(etcd, record, parts, ttl_s)

    with (
        mock.patch.object(client, "Registration", kept_here),
        mock.patch.object(manifests, "_KEPT", _KeptByThread()),
        mock.patch.object(_LOADING, "pace_in_chain", partial(_short_and_patient, loads / _NAPS_S)),
    ):
        yield


def _short_and_patient(nap_s: float, pace: Pace, nbytes: int) -> Pace:
    return replace(
        pace_in_chain(pace, nbytes),
        chunk_nbytes=_BLOCK_NBYTES,
        nap_s=(1e-3, max(nap_s, 0.02)),
        stall_s=_PATIENCE_S,
        patience_s=_PATIENCE_S,
        starve_s=_PATIENCE_S,
    )


class Gate:
    """Where loads wait, until all of them are there."""

    def __init__(self, loads: int) -> None:
        self._loads = loads
        self._there: set[str] = set()
        self._failures: list[BaseException] = []
        self._changed = threading.Condition()
        self._open = threading.Event()

    def enter(self, session_id: str) -> None:
        with self._changed:
            self._there.add(session_id)
            self._changed.notify_all()
        self._open.wait(_PATIENCE_S)

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._failures.append(error)
            self._changed.notify_all()

    def wait_for_all(self, timeout_s: float) -> None:
        """Raises the first error of a load that will not come."""
        with self._changed:
            came = self._changed.wait_for(
                lambda: self._failures or len(self._there) == self._loads, timeout_s
            )
            if self._failures:
                raise self._failures[0]
            if not came:
                raise TimeoutError(
                    f"{len(self._there)} of {self._loads} loads have joined in {timeout_s:.0f} s"
                )

    def open(self) -> None:
        self._open.set()


class GatedEngine(InProcessEngine):
    """Contacts nobody before the gate is open."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    def connect(self, peer: str) -> None:
        self._gate.enter(self.session_id)
        super().connect(peer)
