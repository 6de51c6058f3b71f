"""A clock for transfers on which late threads make no difference."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from engine_loader.transfer.clock import SystemClock
from tests.support.waiting import wait_until


class Gate(threading.Event):
    """Knows which threads wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: set[int] = set()

    def wait(self, timeout: float | None = None) -> bool:
        self.waiting.add(threading.get_ident())
        try:
            return super().wait(timeout)
        finally:
            self.waiting.discard(threading.get_ident())


class SteppedClock(SystemClock):
    """Time passes only while a transfer sleeps, and not before each check has ended that can end.

    `hangs` says whether a thread waits for something. Engines of this process take the clock for
    the module `time`, so that their reads become due by it.
    """

    def __init__(self, hangs: Callable[[int], bool]) -> None:
        self._hangs = hangs
        self._now = 0.0
        self._work: list[tuple[Future[None], list[int]]] = []  # with the threads that do it
        self._later: list[tuple[float, Callable[[], object]]] = []

    def now(self) -> float:
        return self._now

    monotonic = now

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        """Runs the action once so much time has passed."""
        self._later.append((self._now + seconds, action))

    def start(self, work: Callable[[], None], name: str) -> Future[None]:
        threads: list[int] = []

        def run() -> None:
            threads.append(threading.get_ident())
            work()

        future = super().start(run, name)
        self._work.append((future, threads))
        return future

    def sleep(self, seconds: float, wait: Callable[[float], None]) -> None:
        for future, threads in self._work:
            wait_until(lambda: future.done() or any(map(self._hangs, threads)))  # noqa: B023
        self._work = [one for one in self._work if not one[0].done()]
        self._now += seconds
        for due in [one for one in self._later if one[0] <= self._now]:
            self._later.remove(due)
            due[1]()
