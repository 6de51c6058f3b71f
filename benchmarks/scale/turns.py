"""The turn to read the weights of a model from files, as another process that holds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.processes import another_process, ready
from benchmarks.scale.counts import wait_until
from benchmarks.scale.ranks import MODEL, TIMEOUT_S
from engine_loader.starting.lock import lock_name
from engine_registry import Registry

_WITHIN_S = 120.0


@contextmanager
def turn_taken(endpoint: str) -> Iterator[None]:
    """Inside, another process has the turn to read the weights of rank 0 of the model."""
    with another_process(__name__, "take_turn", endpoint):
        yield


def take_turn(endpoint: str) -> None:
    """Runs in a separate process, until standard input ends."""
    with (
        Registry.connect(endpoint, timeout_s=TIMEOUT_S) as registry,
        registry.election(lock_name(MODEL, 0, 1, {})) as turn,
    ):
        wait_until(lambda: turn.leading, _WITHIN_S)
        ready("leads")
