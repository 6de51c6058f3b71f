"""The turn of a rank that has read its weights, until it publishes them: the others wait meanwhile.

Used by `starting.start` and `Seeded`. Starts a thread that ends a turn which lasts too long.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from engine_registry import RankRecord, Registration
from engine_registry.errors import EtcdError
from engine_registry.telemetry.logs import fields
from engine_registry.watching.election import Election

log = logging.getLogger(__name__)
# how long the lead stays while one registration takes the place of another: memory is registered
# and digests are computed meanwhile
_BETWEEN_S = 60.0


def keep_lead_with(record: RankRecord, election: Election) -> None:
    """The lease of the rank's keeper outlives a process that holds the GIL, and no other."""
    try:
        election.keep_with(record)
    except EtcdError as exc:
        log.info(
            "the lead is kept by a separate lease: %s",
            exc,
            extra=fields("lead_not_kept", error=exc),
        )


class Turn:
    """It ends with `publishing`, with `close`, by itself after `longest_s`, or with the process."""

    def __init__(
        self,
        name: str,
        election: Election,
        claim: Registration | None,
        undo: ExitStack,
        longest_s: float,
    ) -> None:
        """`claim`: the registration whose keeper keeps the lead. `undo` ends both."""
        self._name = name
        self._election = election
        self._claim = claim
        self._undo = undo
        self._ending = threading.Lock()
        self._timer = threading.Timer(longest_s, self._expire, [longest_s])
        self._timer.name, self._timer.daemon = "turn to read", True
        self._timer.start()

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """The rank can be registered anew inside. Then the turn is over, also after an error."""
        self._timer.cancel()
        try:
            if self._claim is not None:
                self._keep_lead()
                self._claim.withdraw()
            yield
        finally:
            self.close()

    def _keep_lead(self) -> None:
        try:
            self._election.keep_for(_BETWEEN_S)
        except EtcdError as exc:
            log.info(
                "the lead of %s ends with its registration: %s",
                self._name,
                exc,
                extra=fields("lead_not_kept", error=exc),
            )

    def _expire(self, after_s: float) -> None:
        log.warning(
            "%s has not published its weights within %.3g s, so another process may read them",
            self._name,
            after_s,
            extra=fields("turn_expired"),
        )
        self.close()

    def close(self) -> None:
        """The next process may read. Any number of times, from any thread."""
        self._timer.cancel()
        with self._ending:
            self._undo.close()
