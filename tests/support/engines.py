"""Engines to which something happens in the middle of a load."""

from __future__ import annotations

from collections.abc import Callable

from engine_loader import InProcessEngine, MooncakeEngine
from engine_loader.planning.plan import ReadOp
from engine_loader.publishing.header import NBYTES as HEADER_NBYTES
from tests.support.waiting import wait_until


class Meeting(MooncakeEngine):
    """Knows from whom it has read a header: such peers are read from next."""

    def __init__(self, host: str) -> None:
        super().__init__(host)
        self._headers: dict[int, str] = {}
        self._met: set[str] = set()

    def start(self, peer: str, op: ReadOp) -> int:
        number = super().start(peer, op)
        if op.nbytes == HEADER_NBYTES:
            self._headers[number] = peer
        return number

    def done(self, number: int) -> bool:
        done = super().done(number)
        if done and number in self._headers:
            self._met.add(self._headers[number])
        return done

    def wait_until_met(self, peers: int) -> None:
        """On a busy machine one may bring everything before another has answered."""
        wait_until(lambda: len(self._met) >= peers)


class Interrupted(InProcessEngine):
    """Runs `action` when the read of weights (not of a header) that is the `at`th has come, or with
    `always` every one.
    """

    def __init__(self, action: Callable[[], object], at: int = 1, always: bool = False) -> None:
        super().__init__()
        self._action = action
        self._at = at
        self._always = always
        self._bulk: set[int] = set()
        self._come = 0

    def start(self, peer: str, op: ReadOp) -> int:
        number = super().start(peer, op)
        if op.nbytes != HEADER_NBYTES:
            self._bulk.add(number)
        return number

    def done(self, number: int) -> bool:
        done = super().done(number)
        if done and number in self._bulk:
            self._come += 1
            if self._come == self._at or self._always:
                self._action()
        return done
