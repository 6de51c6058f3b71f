"""Which instances a list shows, in which order, and which of them have changed. Pure.

Used by `engines list`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine_cli.render.states import HELD, UNRESPONSIVE, state_of
from engine_registry import InstanceState, InstanceStatus
from engine_registry.schema.labels import Selector

STATES = ("ready", "degraded", "loading", UNRESPONSIVE, HELD)
ORDERS: dict[str, Callable[[InstanceStatus], Any]] = {
    "name": lambda status: 0,  # as they come
    "model": lambda status: str(status.model),
    "version": lambda status: -1 if status.version is None else status.version,
    "size": lambda status: -status.nbytes,
}


@dataclass(frozen=True)
class Choice:
    """None chooses all."""

    selector: Selector
    model: str | None
    state: str | None
    order: str

    def of(self, statuses: Sequence[InstanceStatus]) -> list[InstanceStatus]:
        return sorted(filter(self._takes, statuses), key=ORDERS[self.order])

    def _takes(self, status: InstanceStatus) -> bool:
        names = {status.model.name, str(status.model)} if status.model else set()
        return (
            self.selector.matches(status.labels)
            and self.model in (None, *names)
            and self.state in (None, state_of(status))
        )


class Changes:
    """Show it all instances again and again."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._listed: dict[str, InstanceStatus] = {}

    def since(self, statuses: Sequence[InstanceStatus]) -> list[InstanceStatus]:
        """Those of the choice that have come or changed since the last time, then those that are
        not among them any more, as they are now.
        """
        chosen = {status.instance: status for status in self._choice.of(statuses)}
        now = {status.instance: status for status in statuses}
        gone = [
            now.get(name) or InstanceStatus(name, InstanceState.GONE)
            for name in self._listed.keys() - chosen.keys()
        ]
        came = [status for name, status in chosen.items() if self._listed.get(name) != status]
        self._listed = chosen
        return [*came, *sorted(gone, key=lambda status: status.instance)]


def none_text(registered: int) -> str:
    """What stands where no instance is listed."""
    return (
        f"no instance matches (registered: {registered:,})"
        if registered
        else "no instance is registered"
    )
