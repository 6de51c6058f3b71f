"""`Reading`: an engine's loader of checkpoints as a fallback, with what came of it."""

from __future__ import annotations

from collections.abc import Callable


class Reading:
    """Whether it has been called and has done its work is asked when something else fails."""

    def __init__(self, read: Callable[[], object]) -> None:
        self._read = read
        self.done = False
        self.failed = False

    def __call__(self) -> None:
        try:
            self._read()
        except BaseException:
            self.failed = True
            raise
        self.done = True
