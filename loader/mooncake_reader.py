"""Reads from one peer: by an engine for this peer alone, or by one that reads from all of them."""

from __future__ import annotations

import threading
import time

from loader.engine import session_of
from loader.errors import EngineFailed, ReadFailed
from loader.mooncake_binding import Binding
from loader.plan import ReadOp

_DRAIN_S = 60.0


class Reader:
    """What reads from one peer, and can be made to stop. `own`: its engine is for this peer alone, and ends with it."""

    def __init__(self, peer: str, protocol: str, binding: Binding, own: bool) -> None:
        self.session_id = session_of(peer)
        self._protocol = protocol
        self._own = own
        self._lock = threading.Lock()  # held during calls, which are short once the peer is connected
        self._binding: Binding | None = binding  # None once closed
        self._connected = False
        self._batches: set[int] = set()  # of one read each, not over yet
        self._unsure = False  # stays True if an interrupt comes before it is noted that a batch has begun, or is over

    @property
    def busy(self) -> bool:
        return bool(self._batches) or self._unsure or not self._connected

    def connect(self) -> None:
        binding = self._binding  # not under the lock: this may last, and then nothing else is going on here
        if not self._connected:
            self._connected = binding is not None and binding.meet(self.session_id)
        if not self._connected:
            raise self.failed()

    def begin(self, op: ReadOp) -> int:
        """The read's batch. ReadFailed where the peer is not connected."""
        with self._lock:
            if self._binding is None or not self._connected:
                raise self.failed()
            self._unsure = True
            batch = self._binding.begin(self.session_id, op)
            if batch is not None:
                self._batches.add(batch)
            self._unsure = False
        if batch is None:
            raise self.failed()
        return batch

    def arrived(self, batch: int) -> bool | None:
        """None: not yet."""
        with self._lock:
            if self._binding is None or batch not in self._batches:  # asking about one that is over ends the process
                return False
            self._unsure = True
            self._batches.discard(batch)
            arrived = self._binding.arrived(self.session_id, batch)
            if arrived is None:
                self._batches.add(batch)
            self._unsure = False
            return arrived

    def close(self) -> None:
        with self._lock:
            binding, self._binding = self._binding, None
            if binding is None:
                return
            if self._own:
                # Destroys the engine, here and now: only a first contact that hangs, and has read nothing, may hold it.
                binding.end()
            else:
                self._drain(binding)

    def _drain(self, binding: Binding) -> None:
        deadline = time.monotonic() + _DRAIN_S
        while self._batches:
            self._batches = {batch for batch in self._batches if binding.arrived(self.session_id, batch) is None}
            if time.monotonic() > deadline:
                raise EngineFailed(
                    f"reads from {self.session_id} have not ended in {_DRAIN_S:.0f} s: the memory that they write to must not be "
                    "used again before this process ends"
                )
            time.sleep(1e-3)

    def failed(self) -> ReadFailed:
        return ReadFailed(
            f"cannot read from {self.session_id}: its process has ended, is not reachable over {self._protocol}, "
            "or does not offer that memory any more",
            session_id=self.session_id,
        )
