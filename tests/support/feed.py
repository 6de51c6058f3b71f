"""An etcd whose watch gives what a test hands it, when it hands it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from engine_registry.schema.keyvalue import Batch, Change, KeyValue, Snapshot
from tests.support.fake_etcd import FakeEtcd


class Feed(FakeEtcd):
    """It holds `items` at revision 1. Each `give` is one batch of changes, and one revision."""

    def __init__(self, *items: KeyValue) -> None:
        super().__init__()
        self.items = items
        self.given: list[Batch] = []
        self.taken = 0  # batches, by who follows
        self.changed = threading.Condition()

    def give(self, *changes: Change) -> None:
        with self.changed:
            self.given.append(Batch(len(self.given) + 2, changes))
            self.changed.notify_all()

    def wait_until_taken(self, batches: int) -> None:
        """Until the reader has come back for more after so many batches."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.taken >= batches, 60)

    def snapshot(self, prefix: str, exact: bool = False) -> Snapshot:
        return Snapshot(1, self.items)

    def count(self, prefix: str, revision: int = 0, exact: bool = False) -> int:
        return len(self.items)

    def get(self, key: str, revision: int = 0) -> KeyValue | None:
        return next((item for item in self.items if item.key == key), None)

    def watch(
        self,
        prefix: str,
        start_revision: int,
        timeout_s: float | None = None,
        exact: bool = False,
        others: Sequence[tuple[str, int, bool]] = (),
    ) -> Any:
        return _Stream(self, timeout_s)


class _Stream:
    def __init__(self, feed: Feed, timeout_s: float | None) -> None:
        self._feed = feed
        self._timeout_s = timeout_s
        self._cancelled = False

    def __iter__(self) -> Iterator[Batch]:
        number = 0
        while (batch := self._at(number)) is not None:
            yield batch
            number += 1
            with self._feed.changed:
                self._feed.taken = number
                self._feed.changed.notify_all()

    def _at(self, number: int) -> Batch | None:
        given = self._feed.given
        with self._feed.changed:
            more = self._feed.changed.wait_for(
                lambda: self._cancelled or len(given) > number, self._timeout_s
            )
            return given[number] if more and not self._cancelled else None

    def cancel(self) -> None:
        with self._feed.changed:
            self._cancelled = True
            self._feed.changed.notify_all()
