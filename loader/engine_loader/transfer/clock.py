"""Time and background work of a transfer, as a seam: tests step through a transfer with a clock
that they move themselves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since some moment; never goes back."""

    def sleep(self, seconds: float, wait: Callable[[float], None]) -> None:
        """`wait` is how an engine waits: it may be woken before."""

    def start(self, work: Callable[[], None], name: str) -> Future[None]:
        """Begins the work beside the caller. The future holds what it raised."""


def at_once(work: Callable[[], None], name: str) -> Future[None]:
    """As `Clock.start`, of work that cannot hang: it is done when this returns."""
    future: Future[None] = Future()
    try:
        work()
        future.set_result(None)
    except Exception as exc:  # noqa: BLE001  the future's owner raises it
        future.set_exception(exc)
    return future


class SystemClock:
    """The machine's monotonic clock, and a daemon thread for each piece of work.

    The threads are daemons because work that hangs must not keep the process from ending.
    """

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float, wait: Callable[[float], None]) -> None:
        wait(seconds)

    def start(self, work: Callable[[], None], name: str) -> Future[None]:
        future: Future[None] = Future()

        def run() -> None:
            try:
                work()
                future.set_result(None)
            except BaseException as exc:  # noqa: BLE001  the future's owner raises it
                future.set_exception(exc)

        threading.Thread(target=run, name=name, daemon=True).start()
        return future
