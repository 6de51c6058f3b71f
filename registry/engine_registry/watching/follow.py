"""All instances as they are, kept up to date, for a list that is shown again with each change."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from engine_registry.errors import EtcdError
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.kept import Kept
from engine_registry.schema.keys import ENGINES
from engine_registry.schema.keyvalue import Batch, Snapshot
from engine_registry.schema.labels import EVERYTHING, Selector
from engine_registry.schema.roster import Roster, instance_of
from engine_registry.schema.status import InstanceStatus


class AllInstances(Kept):
    """All instances, as `Registry.instances` returns them, kept up to date.

    Iterate: all of them as they are now, and again after each change, until `stop`. Changes that
    come while the caller is busy come as one. Raises what etcd refuses for good.

    Starts one thread, which goes on through outages of etcd.
    """

    def __init__(self, etcd: Etcd, selector: Selector = EVERYTHING) -> None:
        """`etcd` is for this alone, which closes it at the end."""
        super().__init__(etcd, ENGINES, "all instances")
        self._selector = selector
        self._news = threading.Condition()  # guards all that follows
        self._rosters: dict[str, Roster] = {}
        self._statuses: dict[str, InstanceStatus] = {}  # of rosters that are as they were then
        self._is_news = False
        self._error: EtcdError | None = None
        self._stopped = False
        self._start()

    def now(self) -> tuple[InstanceStatus, ...]:
        """The instances that are known now, by name. Never waits for etcd."""
        with self._news:
            return self._now()

    def __iter__(self) -> Iterator[tuple[InstanceStatus, ...]]:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._is_news or self._error or self._stopped)
                if self._stopped:
                    return
                if self._error is not None:
                    raise self._error
                self._is_news = False
                found = self._now()
            yield found

    def stop(self) -> None:
        """Ends the iteration. Waits for nothing; from any thread, any number of times."""
        with self._news:
            self._stopped = True
            self._news.notify_all()

    def close(self) -> None:
        """`stop`, and frees what it holds, any number of times."""
        self.stop()
        super().close()

    def _now(self) -> tuple[InstanceStatus, ...]:
        for name in sorted(self._rosters.keys() - self._statuses.keys()):
            self._statuses[name] = self._rosters[name].status()
        found = (self._statuses[name] for name in sorted(self._rosters))
        return tuple(status for status in found if self._selector.matches(status.labels))

    def _take_in(self, update: Snapshot | Batch) -> None:
        with self._news:
            if isinstance(update, Snapshot):
                self._rosters.clear()
                self._statuses.clear()
            for change in update.items if isinstance(update, Snapshot) else update.changes:
                name = instance_of(change.key)
                roster = self._rosters.setdefault(name, Roster(name))
                roster.see(change)
                self._statuses.pop(name, None)
                if roster.empty:
                    del self._rosters[name]
            self._is_news = True
            self._news.notify_all()

    def _refused(self, error: EtcdError) -> None:
        with self._news:
            self._error = error
            self._news.notify_all()
