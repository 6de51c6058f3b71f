"""A user's function that is called for each thing in order, while no other thread waits for it.

Used by `registration.handle`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
T = TypeVar("T")


class Callback(Generic[T]):
    """Starts a thread when there is something to report, which ends when there is no more.

    One that waited for more would keep alive whatever the function refers to, such as a handle that
    its user has forgotten.
    """

    def __init__(self, function: Callable[[T], object], name: str) -> None:
        self._function = function
        self._name = name
        self._lock = threading.Lock()
        self._queue: deque[T] = deque()
        self._running = False

    def put(self, what: T) -> None:
        with self._lock:
            self._queue.append(what)
            if self._running:
                return
            self._running = True
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError as exc:
            log.error(
                "%s: %s is reported later, or never: %s",
                self._name,
                what,
                exc,
                extra=fields("callback_late", error=exc),
            )
            with self._lock:
                self._running = False

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._running = False
                    return
                what = self._queue.popleft()
            try:
                self._function(what)
            except BaseException:  # not even SystemExit ends the reports that are still to come
                log.exception("%s failed", self._name, extra=fields("callback_failed"))
