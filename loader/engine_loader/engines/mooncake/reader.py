"""Reads from one peer: by an engine for this peer alone, or by one that reads from all of them.

An engine for one peer can be ended, and its reads end with it. A shared one cannot, so its reads go
on after they are given up, until the peer answers or the way there is known to be cut.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from engine_loader.engines.base import session_of
from engine_loader.engines.mooncake.binding import Binding
from engine_loader.engines.mooncake.contact import Contact
from engine_loader.engines.mooncake.shared import SharedEngine
from engine_loader.engines.mooncake.sockets import Way, cut
from engine_loader.errors import EngineFailed, ReadFailed
from engine_loader.planning.plan import ReadOp

_AGAIN_S = 2.0  # for a second contact with a peer that has just answered the first
_BYTE_S = 5.0  # and for a byte that is read from it
_CUT_EVERY_S = 0.01
Ended = Callable[[], bool]


class PeerReader:
    """`start` makes an engine for this peer; `shared`, where there is one, is what reads."""

    def __init__(
        self,
        peer: str,
        protocol: str,
        family: str,
        start: Callable[[], Binding],
        shared: SharedEngine | None,
    ) -> None:
        self.session_id = session_of(peer)
        self._protocol = protocol
        self._family = family
        self._start = start
        self._shared = shared
        self._lock = threading.Lock()  # held during calls, which are short for a peer that was met
        self._contact: Contact | None = None  # that is under way
        self._binding: Binding | None = None  # once connected
        self._way: Way = ([], 0)  # then
        self._cut_at = 0.0  # when it was last cut
        self._given_up = False
        self._batches: dict[int, ReadOp] = {}  # of one read each, not over yet
        # Of a call that has not come back. It stays here if an interrupt came before it was noted
        # that the read had begun or was over, or if the library failed: that may still write.
        self._unsure: list[ReadOp] = []

    @property
    def busy(self) -> bool:
        return bool(self._batches or self._unsure) or self._binding is None

    def connect(self) -> None:
        """Makes the first contact, or waits for the one that is being made; ReadFailed."""
        with self._lock:
            if self._binding is not None:
                return
            if self._given_up:
                raise self.failed()
            if self._contact is None:
                self._contact = Contact(self.session_id, self._family, self._meet)
            contact = self._contact
        self._take(contact.result(), contact.way)

    def _take(self, binding: Binding, way: Way) -> None:
        with self._lock:
            if not self._given_up:
                self._binding, self._way, self._contact = binding, way, None
                return
        if self._shared is None:
            binding.end()
        raise self.failed()

    def _meet(self, contact: Contact) -> Binding:
        """On a separate engine, as a peer that does not answer holds up all of an engine.

        An engine that is shared meets the peer when that has just answered.
        """
        own = self._start()
        met = False
        try:
            met = own.meet(self.session_id)
            if met and self._shared is not None:
                contact.allow(_AGAIN_S + _BYTE_S)
                met = self._shared.meet(self.session_id, _BYTE_S)
        finally:
            if not met or self._shared is not None:
                own.end()
        if not met:
            raise self.failed()
        return self._shared.binding if self._shared is not None else own

    def begin(self, op: ReadOp) -> int:
        """The read's batch. ReadFailed where the peer is not connected."""
        with self._lock:
            if self._binding is None or self._given_up:
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
            if self._binding is None or batch not in self._batches:
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
        """Nothing is read any more. Returns what may still write, each with a way to ask."""
        with self._lock:
            self._given_up = True
            contact, self._contact = self._contact, None
            left: list[tuple[ReadOp, Ended]] = []
            if self._shared is None:
                # Here and now: only a contact that hangs, and has read nothing, may hold it.
                if self._binding is not None:
                    self._binding.end()
                self._binding = None
                self._batches.clear()
                self._unsure.clear()
            else:
                left = [(op, self._ended(batch)) for batch, op in self._batches.items()]
                left += [(op, lambda: False) for op in self._unsure]
        if contact is not None:
            contact.break_off()
        elif self._shared is not None:
            self._cut()
        return left

    def _ended(self, batch: int) -> Ended:
        def ended() -> bool:
            try:
                if self.arrived(batch) is not None:
                    return True
            except ReadFailed:
                pass
            except EngineFailed:  # the engine has ended
                return True
            self._cut()
            return False

        return ended

    def _cut(self) -> None:
        """Ends a handshake with the peer.

        A shared engine begins one if the connection that it has read over is lost, and the reads
        from all others wait for it. It tries again some times before a read fails.
        """
        now = time.monotonic()
        if now - self._cut_at >= _CUT_EVERY_S:
            self._cut_at = now
            cut(*self._way)

    def failed(self) -> ReadFailed:
        return ReadFailed(
            f"cannot read from {self.session_id}: its process has ended, is not reachable "
            f"over {self._protocol}, "
            "or does not offer that memory any more",
            session_id=self.session_id,
        )
