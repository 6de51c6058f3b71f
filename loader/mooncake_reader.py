"""Reads from one peer: by an engine for this peer alone, or by one that reads from all of them.

An engine of its own can be ended, and its reads end with it. A shared one cannot, so its reads go
on after they are given up, until the peer answers or the way there is known to be cut.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from loader.engine import session_of
from loader.errors import EngineFailed, ReadFailed
from loader.mooncake_binding import Binding
from loader.plan import ReadOp

Ended = Callable[[], bool]


class Reader:
    """What reads from one peer. `own`: its engine is for this peer alone, and ends with it."""

    def __init__(self, peer: str, protocol: str, binding: Binding, own: bool) -> None:
        self.session_id = session_of(peer)
        self._protocol = protocol
        self._own = own
        self._lock = threading.Lock()  # held during calls, which are short once the peer is connected
        self._binding = binding
        self._connected = False
        self._given_up = False
        self._batches: dict[int, ReadOp] = {}  # of one read each, not over yet
        # What a call is about that has not come back. It stays here if an interrupt came before it
        # was noted that the read had begun or was over, or if the library failed: that may still write.
        self._unsure: list[ReadOp] = []

    @property
    def busy(self) -> bool:
        return bool(self._batches or self._unsure) or not self._connected

    def connect(self) -> None:
        # Not under the lock: this may last, and then nothing else is going on here.
        if not self._connected and not self._given_up:
            self._connected = self._binding.meet(self.session_id)
        if not self._connected:
            raise self.failed()

    def begin(self, op: ReadOp) -> int:
        """The read's batch. ReadFailed where the peer is not connected."""
        with self._lock:
            if self._given_up or not self._connected:
                raise self.failed()
            self._unsure.append(op)
            batch = self._binding.begin(self.session_id, op)
            if batch is not None:
                self._batches[batch] = op
            self._unsure.pop()
        if batch is None:
            raise self.failed()
        return batch

    def arrived(self, batch: int) -> bool | None:
        """Whether it has brought its bytes; None: not yet. Nothing of what was given up has."""
        with self._lock:
            if batch not in self._batches:
                return False
            self._unsure.append(self._batches[batch])
            del self._batches[batch]  # asking about one that is over ends the process
            try:
                arrived = self._binding.arrived(self.session_id, batch)
            except ReadFailed:
                self._batches[batch] = self._unsure.pop()
                raise
            if arrived is None:
                self._batches[batch] = self._unsure[-1]
            self._unsure.pop()
        return arrived if arrived is None else arrived and not self._given_up

    def give_up(self) -> list[tuple[ReadOp, Ended]]:
        """Nothing can be read any more. Returns what may still write, and how to ask whether it has ended."""
        with self._lock:
            self._given_up = True
            if self._own:
                # Destroys the engine, here and now: only a first contact that hangs, and has read nothing, may hold it.
                self._binding.end()
                self._batches.clear()
                self._unsure.clear()
            left: list[tuple[ReadOp, Ended]] = [(op, self._ended(batch)) for batch, op in self._batches.items()]
            return left + [(op, lambda: False) for op in self._unsure]

    def _ended(self, batch: int) -> Ended:
        def ended() -> bool:
            try:
                return self.arrived(batch) is not None
            except ReadFailed:
                return False
            except EngineFailed:  # the engine has ended
                return True

        return ended

    def failed(self) -> ReadFailed:
        return ReadFailed(
            f"cannot read from {self.session_id}: its process has ended, is not reachable over {self._protocol}, "
            "or does not offer that memory any more",
            session_id=self.session_id,
        )
