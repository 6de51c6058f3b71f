"""`Reading`: an engine's loader of checkpoints as a fallback, with what came of it."""

from __future__ import annotations

from collections.abc import Callable


class Reading:
    """Whether it has been called and has done its work is asked when something else fails."""

    def __init__(
        self, read: Callable[[], object], allocate: Callable[[], object] | None = None
    ) -> None:
        """`allocate` gives the tensors memory, if they have none yet. Any number of times."""
        self._read = read
        self._allocate = allocate
        self.done = False
        self.failed = False

    def __call__(self) -> None:
        try:
            if self._allocate is not None:
                self._allocate()
            self._read()
        except BaseException:
            self.failed = True
            raise
        self.done = True
