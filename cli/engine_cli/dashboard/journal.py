"""What a page shows, entry by entry, with the revision at which each last changed: so every browser
gets what has changed since it was last told, however slow it is. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MAX_DELETIONS = 20_000  # that are remembered; who has missed more gets everything again

Key = tuple[str, str]  # what kind of entry, and which


@dataclass(frozen=True)
class Changes:
    """`entries` are values by key; None where the entry is gone.

    `whole`: these are all entries, and whatever was known before is void.
    """

    revision: int
    whole: bool
    entries: tuple[tuple[Key, Any], ...]


class Journal:
    """Not thread-safe."""

    def __init__(self, max_deletions: int = MAX_DELETIONS) -> None:
        self._max_deletions = max_deletions
        self._entries: OrderedDict[Key, tuple[int, Any]] = OrderedDict()  # the last changed is last
        self._deletions: OrderedDict[Key, int] = OrderedDict()
        self._forgotten = 0  # up to this revision deletions are not known any more
        self.revision = 0

    def put(self, key: Key, value: Any) -> None:
        """What is there already is no change."""
        known = self._entries.get(key)
        if known is not None and known[1] == value:
            return
        self.revision += 1
        self._deletions.pop(key, None)
        self._entries[key] = (self.revision, value)
        self._entries.move_to_end(key)

    def delete(self, key: Key) -> None:
        if self._entries.pop(key, None) is None:
            return
        self.revision += 1
        self._deletions[key] = self.revision
        if len(self._deletions) > self._max_deletions:
            _, self._forgotten = self._deletions.popitem(last=False)

    def since(self, revision: int | None) -> Changes:
        """All entries for a reader who knows nothing (None), or has missed too much."""
        if revision is None or revision < self._forgotten:
            return Changes(
                self.revision,
                True,
                tuple((key, value) for key, (_, value) in self._entries.items()),
            )
        changed = []
        for key, (at, value) in reversed(self._entries.items()):
            if at <= revision:
                break
            changed.append((key, value))
        for key, at in reversed(self._deletions.items()):
            if at <= revision:
                break
            changed.append((key, None))
        return Changes(self.revision, False, tuple(changed))
