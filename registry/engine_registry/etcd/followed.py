"""What a follower knows of a prefix or a key that it follows: from where its watch goes on, and by
what another store would show. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine_registry.schema.keyvalue import Batch, KeyValue, Snapshot


@dataclass
class Followed:
    """`exact`: only the key of that name is followed. `optional`: or nothing of it, where etcd does
    not let us read it.
    """

    prefix: str
    exact: bool = False
    optional: bool = False
    revision: int = 0  # that is known; 0 where nothing is
    count: int = 0  # of keys at that revision
    newest: KeyValue | None = None  # of them, unless it was deleted

    def begin(self, snapshot: Snapshot) -> None:
        """`snapshot` has what there is of it, and may have more."""
        items = [item for item in snapshot.items if self._has(item.key)]
        self.revision, self.count = snapshot.revision, len(items)
        self.newest = max(items, key=lambda item: item.mod_revision, default=None)

    def remember(self, batch: Batch) -> None:
        self.revision = batch.revision
        for change in batch.changes:
            if isinstance(change, KeyValue):
                self.count += change.create_revision == change.mod_revision
                self.newest = change
            else:
                self.count -= 1
                if self.newest is not None and self.newest.key == change.key:
                    self.newest = None

    def _has(self, key: str) -> bool:
        return key == self.prefix if self.exact else key.startswith(self.prefix)
