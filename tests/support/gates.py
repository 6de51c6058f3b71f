"""Loads that stop where a test wants it."""

from __future__ import annotations

import threading
import time

from engine_loader import Progress
from tests.support.waiting import wait_until


class Gate:
    """Slows a load and stops it in its progress function, at a part of all bytes.

    Until it stops, each chunk waits for the checks that have begun, however busy the machine is:
    what a stopped load offers to others is what was checked, nearly all that it has by then.
    """

    def __init__(self, stop_at: float) -> None:
        self._stop_at = stop_at
        self.reached = threading.Event()
        self.open = threading.Event()
        self.at = 0.0

    def see(self, progress: Progress) -> None:
        time.sleep(0.01)  # longer than the load without it, so that checks come in between
        if self._stop_at <= 1 and not self.open.is_set():
            wait_for_checks()
        self.at = progress.nbytes / max(progress.total_nbytes, 1)
        if self.at >= self._stop_at:
            self.reached.set()
            assert self.open.wait(60)


def wait_for_checks() -> None:
    """Until no load of this process checks a source."""
    wait_until(
        lambda: not any(thread.name.startswith("check of ") for thread in threading.enumerate())
    )
