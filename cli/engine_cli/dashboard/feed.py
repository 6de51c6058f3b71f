"""Keeps the state of the page up to date: one watch and one look at tickets for all browsers.

Used by `server`. Starts one thread, which shows the state each event and lets it look at tickets
four times a second; where many ranks make that costly, less often. It goes on through outages of
etcd.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone

from engine_cli.dashboard.journal import Changes
from engine_cli.dashboard.state import State
from engine_registry import RankRecord, Registry
from engine_registry.schema.moment import utc
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
BEAT_S = 0.25  # from one look to the next, at least
_REST = 4  # times as long as a look takes, so that very many ranks do not cost a core
_JOIN_S = 5.0


class Feed:
    """Runs from `start` to `close`, or until etcd refuses for good."""

    def __init__(self, registry: Registry, on_end: Callable[[BaseException], object]) -> None:
        """`on_end` is called from the thread, with what etcd has refused."""
        self._lock = threading.Lock()  # guards the state
        self._state = State(datetime.now(timezone.utc))
        self._away_since: str | None = None
        self._ended = threading.Event()
        self._watch = registry.watch()
        self._pulls = registry.follow_pulls()
        self._on_end = on_end
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def since(self, revision: int | None) -> Changes:
        """What has changed; from any thread."""
        with self._lock:
            return self._state.since(revision)

    def record(self, instance: str, rank: int) -> RankRecord | None:
        """As it was when the watch told of it last."""
        with self._lock:
            return self._state.record(instance, rank)

    def close(self) -> None:
        """Any number of times."""
        self._ended.set()
        self._watch.stop()
        self._pulls.close()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        due = time.monotonic()
        try:
            while not self._ended.is_set():
                event = self._watch.next(max(0.0, due - time.monotonic()))
                if event is not None:
                    with self._lock:
                        self._state.see(event, datetime.now(timezone.utc))
                start = time.monotonic()
                if start >= due and not self._watch.stopped:
                    self._look(start)
                    due = time.monotonic() + max(BEAT_S, _REST * (time.monotonic() - start))
        except Exception as exc:  # noqa: BLE001  a thread has no caller above it: `on_end` tells of it
            log.info("the dashboard ends: %s", exc, extra=fields("dashboard_ended", error=exc))
            self._ended.set()
            self._on_end(exc)

    def _look(self, now: float) -> None:
        away = self._watch.away
        if away is None:
            self._away_since = None
        elif self._away_since is None:
            self._away_since = utc()
        with self._lock:
            self._state.away(self._away_since, away.what if away else "")
            self._state.look(self._pulls.now(), now, self._pulls.unseen, self._watch.held)
