"""`Selection`: which events of a watch are about the instances that a selector chooses. Pure."""

from __future__ import annotations

from engine_registry.schema.labels import EVERYTHING, Selector
from engine_registry.watching.events import Event, InstanceGone, RankEvent, VersionReleased


class Selection:
    """Show it every event of the watch. Not thread-safe."""

    def __init__(self, selector: Selector) -> None:
        self._selector = selector
        self._shown: set[str] = set()  # the instances that were chosen when they were last reported

    def takes(self, event: Event) -> bool:
        """Whether it is about what is chosen. An instance that is gone has no labels any more: it
        is as it was.
        """
        if isinstance(event, RankEvent):
            return self._selector.matches(event.record.labels)
        if isinstance(event, VersionReleased):
            return self._selector is EVERYTHING or event.instance in self._shown
        instance = event.status.instance
        was_shown = instance in self._shown
        is_chosen = not isinstance(event, InstanceGone) and self._selector.matches(
            event.status.labels
        )
        (self._shown.add if is_chosen else self._shown.discard)(instance)
        return was_shown or is_chosen
