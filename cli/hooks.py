"""Runs the user's command for every event, one after another in a thread of its own, so that no hook holds up the watch."""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import threading
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)
_MAX_WAITING = 1_000


class Hooks:
    """`sh -c COMMAND`, with the event as JSON on standard input and in ENGINES_EVENT, _INSTANCE, _RANK, _REASON and _STATE.

    A hook that fails or takes longer than `timeout_s` is reported, and the next one runs.
    """

    def __init__(self, command: str, timeout_s: float) -> None:
        self._command = command
        self._timeout_s = timeout_s
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name="hooks", daemon=True)

    def run(self, event: dict[str, Any]) -> None:
        try:
            self._events.put_nowait(event)
        except queue.Full:
            log.error("no hook is run for %s: %d are waiting already", event["event"], _MAX_WAITING)

    def _work(self) -> None:
        while (event := self._events.get()) is not None:
            names = {"ENGINES_EVENT": "event", "ENGINES_INSTANCE": "instance", "ENGINES_RANK": "rank"}
            names |= {"ENGINES_REASON": "reason", "ENGINES_STATE": "state"}
            env = {**os.environ, **{name: str(event.get(key, "")) for name, key in names.items()}}
            what = f"the hook for {event['event']} of {event['instance']}"
            try:
                hook = subprocess.run(
                    ["/bin/sh", "-c", self._command],
                    input=json.dumps(event),
                    text=True,
                    env=env,
                    timeout=self._timeout_s,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                log.error("%s was ended after %g s: %s", what, self._timeout_s, self._command)
            except OSError as exc:
                log.error("%s could not be started: %s", what, exc)
            else:
                if hook.returncode:
                    log.error("%s failed with code %d: %s", what, hook.returncode, self._command)

    def __enter__(self) -> Hooks:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Lets the hooks that wait finish."""
        self._events.put(None)
        self._thread.join()
