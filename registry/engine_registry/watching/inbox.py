"""Updates from etcd that a watch has not taken yet, each with the time when it came.

Used by `watching.watch`. Starts one thread, which reads a Follower. It holds no reference to the
watch, so a watch that is forgotten can be collected.
"""

from __future__ import annotations

import queue
import threading
import time

from engine_registry.errors import EtcdError
from engine_registry.etcd.follow import Follower
from engine_registry.schema.keyvalue import Batch, Snapshot

_MAX_QUEUED = 1_000  # batches; then the thread waits, and etcd keeps the rest

Update = Snapshot | Batch | EtcdError | None  # an error, or None, is the last


class Inbox:
    """Filled from the end of `__init__` until the follower ends."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._queue: queue.SimpleQueue[tuple[float, Update]] = queue.SimpleQueue()
        self._places = threading.Semaphore(_MAX_QUEUED)
        self._held_s = 0.0  # for how long the thread has waited for a place
        self._full_since: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="registry watch", daemon=True)
        self._thread.start()

    def get(self, timeout_s: float | None) -> tuple[float, Update]:
        """The next update, and when it came by `now`. Raises queue.Empty if none is in time."""
        item = self._queue.get(timeout=timeout_s)
        self._places.release()
        return item

    def now(self) -> float:
        """A clock for blips.

        It stands still while the thread waits for a place: what etcd holds back is not late.
        """
        full_since = self._full_since
        return (time.monotonic() if full_since is None else full_since) - self._held_s

    @property
    def full(self) -> bool:
        """Whether the thread waits for a place."""
        return self._full_since is not None

    def __len__(self) -> int:
        return self._queue.qsize()

    def stop(self) -> None:
        """Ends a `get` that waits. From any thread, any number of times."""
        self._stopped.set()
        self._follower.stop()
        self._queue.put((0.0, None))

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended within the time."""
        self._thread.join(timeout=timeout_s)
        return not self._thread.is_alive()

    def _read(self) -> None:
        try:
            for update in self._follower:
                self._put(update)
            self._put(None)
        except EtcdError as exc:
            self._put(exc)

    def _put(self, update: Update) -> None:
        came_at = self.now()
        if not self._places.acquire(blocking=False):
            self._full_since = time.monotonic()
            while not self._places.acquire(timeout=0.1):
                if self._stopped.is_set():
                    return
            self._held_s += time.monotonic() - self._full_since
            self._full_since = None
        self._queue.put((came_at, update))
