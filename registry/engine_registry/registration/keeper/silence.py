"""How long a rank has left its keeper without an answer. Used by `keeper.main`. Pure."""

from __future__ import annotations

import math


class Silence:
    """Counted in waits. So a keeper that was itself stopped, or that waited for etcd, finds one
    wait that took long, and not that its rank was silent all the while.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._is_asked = False
        self.seconds = 0.0  # since the rank was asked, and has said nothing

    def ask(self) -> None:
        """The rank has to say something from now on."""
        self._is_asked = True

    def wait(self, seconds: float) -> None:
        """So long nothing came."""
        if self._is_asked:
            self.seconds += seconds

    def end(self) -> None:
        """The rank has said something."""
        self._is_asked, self.seconds = False, 0.0

    @property
    def is_too_long(self) -> bool:
        return self.seconds >= self._limit_s

    @property
    def left_s(self) -> float:
        """Until it is too long; infinite where it is not counted, or is too long already."""
        if not self._is_asked or self.is_too_long:
            return math.inf
        return self._limit_s - self.seconds
