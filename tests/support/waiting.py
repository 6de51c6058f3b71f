"""Waiting for what another thread or process does: never a sleep of a guessed length."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(reached: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """For what gives no sign when it happens."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not reached within {timeout_s} s")
        time.sleep(0.001)
