"""Named points of the code at which a test lets something happen: another rank comes, a key
changes, Ctrl-C is pressed.

Nothing happens at a point that no test has given an action. Pure.
"""

from __future__ import annotations

from collections.abc import Callable

ACTIONS: dict[str, Callable[[], object]] = {}  # by the point's name


def reach(point: str) -> None:
    """Runs the point's action, in the thread that has come there."""
    action = ACTIONS.get(point)
    if action is not None:
        action()
