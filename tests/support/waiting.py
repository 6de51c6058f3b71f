"""Waiting for what another thread or process does: never a sleep of a guessed length."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def wait_until(reached: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """For what gives no sign when it happens."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not reached within {timeout_s} s")
        time.sleep(0.001)


def no_check_is_running() -> bool:
    """Of a source, by a load of this process."""
    return not any(thread.name.startswith("check of ") for thread in threading.enumerate())
