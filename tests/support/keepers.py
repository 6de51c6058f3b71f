"""The keeper process of a registration."""

from __future__ import annotations

from engine_registry.registration.handle import Registration
from tests.support.waiting import wait_until


def pid_of_keeper(registration: Registration) -> int:
    """Waits while a keeper that has died is being replaced."""
    pids: list[int] = []

    def seen() -> bool:
        pid = registration.keeper_pid
        if pid is not None:
            pids.append(pid)
        return bool(pids)

    wait_until(seen)
    return pids[0]
