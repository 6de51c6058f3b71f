"""What a keeper has of its rank's memory, and what it answers those who ask for it. See
`registration.descriptors` and `registration.held` for the packets.

Used by `keeper.desk`, whose thread alone touches it. Has no socket, and looks at no clock but that
of its caller.
"""

from __future__ import annotations

import hmac
import json
import math
from collections.abc import Mapping
from typing import Any

from engine_registry.registration.descriptors import (
    MAGIC,
    MOST_AT_ONCE,
    REQUEST,
    DescriptorPlace,
    close_all,
)
from engine_registry.registration.held import FINISH, LET_GO, LOOK, SHARE, TAKE

MOST_NBYTES = REQUEST.size  # of a packet
_MOST_SHARERS = 256
_OK = b"+"
_LIVES = b"-the rank's process lives"
_KIND_NBYTES = len(TAKE)


class Caller:
    """A connection. `waits`: for how many descriptors from which on, which it has not taken yet."""

    def __init__(self, until: float, pid: int) -> None:
        self.until = until  # then it is sent away, on the clock of time.monotonic
        self.pid = pid
        self.waits: tuple[int, int] | None = None

    @property
    def stays(self) -> bool:
        """It takes or shares the memory, until it ends."""
        return self.until == math.inf

    def stay(self) -> None:
        self.until = math.inf


class Stock:
    """Descriptors, where they are handed out, and whether they are held."""

    def __init__(self) -> None:
        self.place: DescriptorPlace | None = None
        self.fds: list[int] = []
        self.facts: Mapping[str, Any] = {}  # for those that look: of which rank it is
        self.until = math.inf  # then all is closed, on the clock of time.monotonic
        self.held_until = ""  # UTC, once it is held
        self._coming = 0  # descriptors that the rank will pass on
        self._taker: Caller | None = None
        self._sharers: set[Caller] = set()

    def begin(self, place: DescriptorPlace, count: int) -> None:
        """So many come next."""
        self.clear()
        self.place, self._coming = place, count

    @property
    def is_complete(self) -> bool:
        """All are there, and one at least."""
        return self.place is not None and len(self.fds) == self._coming > 0

    @property
    def is_held(self) -> bool:
        return bool(self.held_until)

    def clear(self) -> None:
        """Closes all."""
        close_all(self.fds)
        self.place, self._coming = None, 0
        self.until, self.held_until = math.inf, ""
        self._taker = None
        self._sharers.clear()

    def forget(self, caller: Caller) -> None:
        """It has gone: what it took without having finished is held on."""
        self._sharers.discard(caller)
        if self._taker is caller:
            self._taker = None

    def asked(self, packet: bytes) -> tuple[int, int] | None:
        """For which descriptors; None where that is no request for some that there are."""
        if self.place is None or len(packet) != REQUEST.size:
            return None
        magic, secret, first, count = REQUEST.unpack(packet)
        if magic != MAGIC or not hmac.compare_digest(secret, self.place.secret):
            return None
        if not 0 < count <= MOST_AT_ONCE or first + count > len(self.fds):
            return None
        return first, count

    def answer(self, packet: bytes, caller: Caller, now: float) -> bytes | None:
        """To any other request; None to what is none. What is let go is closed when this returns,
        and then nothing is held any more.
        """
        kind, secret = packet[:_KIND_NBYTES], packet[_KIND_NBYTES:]
        if self.place is None:
            return None
        if kind in (TAKE, SHARE):
            if not hmac.compare_digest(secret, self.place.secret):
                return None
            return self._take(caller) if kind == TAKE else self._share(caller)
        if packet == LOOK:
            return _OK + json.dumps(self._look(now)).encode()
        if packet == LET_GO:
            return self._let_go() if self.is_held else _LIVES
        if packet == FINISH and caller is self._taker:
            return self._let_go()
        return None

    def _look(self, now: float) -> dict[str, Any]:
        return {
            **self.facts,
            "held_until": self.held_until,
            "held_for_s": max(0.0, self.until - now) if self.is_held else 0.0,
            "sharers": len(self._sharers),
        }

    def _take(self, caller: Caller) -> bytes:
        if not self.is_held:
            return _LIVES
        if self._taker is not None and self._taker is not caller:
            return f"-process {self._taker.pid} is taking the memory".encode()
        self._taker = caller
        caller.stay()
        return _OK

    def _share(self, caller: Caller) -> bytes:
        if self._taker is not None:
            return f"-process {self._taker.pid} is taking the memory".encode()
        if caller not in self._sharers and len(self._sharers) >= _MOST_SHARERS:
            return f"-{_MOST_SHARERS} processes share the memory already".encode()
        self._sharers.add(caller)
        caller.stay()
        return _OK

    def _let_go(self) -> bytes:
        self.clear()
        return _OK
