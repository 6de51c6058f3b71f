"""Waiting for what another thread or process does: never a sleep of a guessed length."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(reached: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """For what gives no sign when it happens."""
    start = time.monotonic()
    while not reached():
        waited_s = time.monotonic() - start
        if waited_s > timeout_s:
            raise TimeoutError(f"not reached within {timeout_s} s")
        # To look may cost a CPU as much as what is waited for: so less often what takes long.
        time.sleep(min(max(0.001, waited_s / 10), 0.01))
