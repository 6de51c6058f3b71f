"""Runs the user's command for every event, one after another in a separate thread, so that a hook
seldom holds up the watch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import threading
from collections import deque
from types import TracebackType
from typing import Any

from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_MAX_WAITING = 10_000  # then the caller with the next event waits
_LAST_S = 5.0  # for the hook that runs when it is time to stop
VARIABLES = {
    "ENGINES_EVENT": "event",
    "ENGINES_INSTANCE": "instance",
    "ENGINES_RANK": "rank",
    "ENGINES_REASON": "reason",
    "ENGINES_STATE": "state",
}


class Hooks:
    """`sh -c COMMAND`, with the event as JSON on standard input and in ENGINES_EVENT, _INSTANCE,
    _RANK, _REASON and _STATE.

    A hook that fails or takes longer than `timeout_s` is reported, and the next one runs. Each has
    its own process group, so that all of it can be ended, and Ctrl-C does not reach it.
    """

    def __init__(self, command: str, timeout_s: float) -> None:
        self._command = command
        self._timeout_s = timeout_s
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: deque[dict[str, Any]] = deque()
        self._running: subprocess.Popen[str] | None = None
        self._complete = False  # no event is still to come
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="hooks", daemon=True)

    def run(self, event: dict[str, Any]) -> None:
        """Returns at once, unless very many are waiting already: no event goes without its hook."""
        with self._changed:
            self._waiting.append(event)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or len(self._waiting) <= _MAX_WAITING)

    def stop(self) -> None:
        """No other hook begins. The one that runs has some seconds to end, and is killed then."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        last = threading.Timer(_LAST_S, self.kill)
        last.daemon = True
        last.start()

    def kill(self) -> None:
        """No other hook begins, and the one that runs ends now, with all that it has started."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            if self._running is not None and self._running.poll() is None:
                os.killpg(self._running.pid, signal.SIGKILL)

    def report(self) -> None:
        """Logs how many hooks were not run."""
        with self._changed:
            if self._waiting:
                log.warning(
                    "hooks that were not run: %d",
                    len(self._waiting),
                    extra=fields("hooks_not_run", count=len(self._waiting)),
                )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._complete or self._waiting)
                if self._stopped or not self._waiting:
                    return
                event = self._waiting.popleft()
                self._changed.notify_all()
                what = f"the hook for {event['event']} of {event['instance']}"
                try:
                    hook = self._running = self._start(event)
                except OSError as exc:
                    log.error(
                        "%s could not be started: %s",
                        what,
                        exc,
                        extra=_facts("hook_not_started", event),
                    )
                    continue
            self._wait(hook, event, what)

    def _start(self, event: dict[str, Any]) -> subprocess.Popen[str]:
        env = {**os.environ, **{name: str(event.get(key, "")) for name, key in VARIABLES.items()}}
        command = ["/bin/sh", "-c", self._command]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, text=True, env=env, start_new_session=True
        )

    def _wait(self, hook: subprocess.Popen[str], event: dict[str, Any], what: str) -> None:
        try:
            hook.communicate(json.dumps(event), timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(hook.pid, signal.SIGKILL)
            hook.communicate()
            log.error(
                "%s was ended after %g s: %s",
                what,
                self._timeout_s,
                self._command,
                extra=_facts("hook_timed_out", event),
            )
        else:
            if hook.returncode:
                log.error(
                    "%s failed with code %d: %s",
                    what,
                    hook.returncode,
                    self._command,
                    extra=_facts("hook_failed", event, code=hook.returncode),
                )

    def __enter__(self) -> Hooks:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Lets the hooks that wait finish, unless they were stopped."""
        with self._changed:
            self._complete = True
            self._changed.notify_all()
        self._thread.join()
        self.report()


def _facts(name: str, event: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return fields(
        name, hook_event=event["event"], instance=event["instance"], rank=event.get("rank"), **facts
    )
