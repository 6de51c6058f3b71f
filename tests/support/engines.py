"""Engines to which something happens in the middle of a load."""

from __future__ import annotations

from collections.abc import Callable

from engine_loader import InProcessEngine
from engine_loader.planning.plan import ReadOp
from engine_loader.publishing.header import NBYTES as HEADER_NBYTES


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
