"""An etcd in memory for what registrations need of one: revisions, guarded transactions, leases. No
threads, no clock.

Faults have names: `available` False refuses every call, `full` what takes space, `expire` ends a
lease, `delete` removes a key as an operator would, `lose_next_answer` carries the next transaction
out without saying so, `retry_next_commit` carries it out and then tries it again, as the adapter
does where an answer was lost, `before_commit` runs between a reader's look and its write,
`refuse_to_revoke` is what etcd does where a key that we may not write hangs on the lease, and
`refuse_to_watch` where no watch is to be had.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from engine_registry.errors import EtcdFull, EtcdRefused, EtcdUnavailable, LeaseNotFound
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.registration.keeper.key_watch import KeyWatch
from engine_registry.schema.keyvalue import (
    Change,
    Delete,
    Deletion,
    Found,
    Guard,
    KeyValue,
    Outcome,
    Put,
    Range,
    Snapshot,
)


class FakeEtcd(Etcd):
    def __init__(self) -> None:
        super().__init__(EtcdConfig(parse_endpoints("fake:1")))
        self.available = True
        self.before_commit: Callable[[], None] | None = None
        self.full = False
        self.lose_next_answer = False
        self.retry_next_commit = False
        self.refuse_to_revoke = False
        self.refuse_to_watch = False
        self.refused = 0  # calls
        self.renewed: list[int] = []
        self.history: list[Change] = []  # all that a watcher would have seen
        self.stores = 1  # that it has had, one after the other
        self.looks = 0  # snapshots of one key
        self._revision = 1
        self._items: dict[str, KeyValue] = {}
        self._leases: dict[int, float] = {}
        self._lease_ids = itertools.count(100)

    # -- what a test looks at and breaks
    # -------------------------------------------------------------------------------------

    @property
    def keys(self) -> list[str]:
        return sorted(self._items)

    @property
    def leases(self) -> dict[int, float]:
        """The time to live, in seconds, of each lease that lives."""
        return dict(self._leases)

    def value(self, key: str) -> bytes:
        return self._items[key].value

    def expire(self, lease_id: int) -> None:
        del self._leases[lease_id]
        self._apply([Delete(key) for key, item in self._items.items() if item.lease_id == lease_id])

    def expire_all(self) -> None:
        for lease_id in list(self._leases):
            self.expire(lease_id)

    def delete(self, key: str) -> None:
        self._apply([Delete(key)])

    def put(self, key: str, value: bytes) -> None:
        self._apply([Put(key, value, 0)])

    def restore(self, writes: Sequence[Put], back_to_revision: int) -> None:
        """From a backup that has no key but what `writes` puts, at a new revision."""
        self._items.clear()
        self.stores += 1
        self._revision = back_to_revision
        self._apply(writes)

    def lease_of(self, key: str) -> int:
        return self._items[key].lease_id

    # -- etcd
    # ----------------------------------------------------------------------------------------------

    def get(self, key: str, revision: int = 0) -> KeyValue | None:
        self._check_available()
        if revision:
            raise NotImplementedError("the fake keeps no history")
        return self._items.get(key)

    def count(self, prefix: str, revision: int = 0, exact: bool = False) -> int:
        return len(self.snapshot(prefix, exact).items)

    def snapshot(self, prefix: str, exact: bool = False) -> Snapshot:
        self._check_available()
        self.looks += exact
        return Snapshot(
            self._revision,
            tuple(
                self._items[key]
                for key in sorted(self._items)
                if (key == prefix if exact else key.startswith(prefix))
            ),
        )

    def read(self, ranges: Sequence[Range]) -> tuple[int, list[Found]]:
        self._check_available()
        found = []
        for wanted in ranges:
            keys = [
                key
                for key in sorted(self._items)
                if (wanted.key <= key < wanted.end if wanted.end else key == wanted.key)
            ]
            some = [
                replace(item, value=b"") if wanted.keys_only else item
                for item in map(self._items.__getitem__, [] if wanted.count_only else keys)
                if item.create_revision > wanted.created_after
            ]
            found.append(Found(tuple(some[: wanted.limit or None]), len(keys)))
        return self._revision, found

    def decide(
        self,
        guards: Sequence[Guard],
        writes: Sequence[Put | Delete],
        then: Sequence[Range] = (),
        otherwise: Sequence[Range] = (),
    ) -> Outcome:
        revision = self.commit(guards, writes)
        _, found = self.read(then if revision else otherwise)
        return Outcome(bool(revision), revision or self._revision, found)

    def commit(self, guards: Sequence[Guard], writes: Sequence[Put | Delete]) -> int:
        self._check_available()
        hook, self.before_commit = self.before_commit, None
        if hook is not None:
            hook()
        if self.full and any(isinstance(write, Put) for write in writes):
            raise EtcdFull("etcd has no space")
        if not all(map(self._holds, guards)):
            return 0
        for write in writes:
            if isinstance(write, Put):
                self._check_put(write)
        self._apply(writes)
        if self.retry_next_commit:
            self.retry_next_commit = False
            return self.commit(guards, writes)
        if self.lose_next_answer:
            self.lose_next_answer = False
            raise EtcdUnavailable("the answer was lost")
        return self._revision

    def grant(self, ttl_s: float) -> int:
        self._check_available()
        if self.full:
            raise EtcdFull("etcd has no space")
        lease_id = next(self._lease_ids)
        self._leases[lease_id] = ttl_s
        return lease_id

    def keep_alive(self, lease_id: int) -> float:
        self._check_available()
        if lease_id not in self._leases:
            raise LeaseNotFound(f"lease {lease_id} has expired")
        self.renewed.append(lease_id)
        return self._leases[lease_id]

    def revoke(self, lease_id: int) -> None:
        self._check_available()
        if self.refuse_to_revoke:
            raise EtcdRefused("permission denied")
        if lease_id in self._leases:
            self.expire(lease_id)

    def _connected(self) -> Any:
        raise NotImplementedError("the fake has no connection: give it the method that was called")

    def _check_available(self) -> None:
        if not self.available:
            self.refused += 1
            raise EtcdUnavailable("etcd is away")

    def _check_put(self, write: Put) -> None:
        if write.lease_id is None and write.key not in self._items:
            raise EtcdRefused("the lease of a key that does not exist cannot be kept")
        if write.lease_id and write.lease_id not in self._leases:
            raise LeaseNotFound(f"lease {write.lease_id} has expired")

    def _holds(self, guard: Guard) -> bool:
        """As in etcd, an absent key has revision 0, and a guard on a prefix holds for each key that
        is there.
        """
        found = [
            self._items[key]
            for key in self._items
            if key == guard.key or (guard.prefix and key.startswith(guard.key))
        ]
        values = [getattr(item, guard.target) for item in found] or [0]
        if guard.content is not None and [item.value for item in found] != [guard.content]:
            return False
        if guard.result == "EQUAL":
            return all(value == guard.value for value in values)
        if guard.result == "LESS":
            return all(value < guard.value for value in values)
        if guard.result == "GREATER":
            return all(value > guard.value for value in values)
        raise NotImplementedError(guard.result)

    def _apply(self, writes: Sequence[Put | Delete]) -> None:
        self._revision += 1
        for write in writes:
            if isinstance(write, Delete):
                for key in [
                    key
                    for key in self._items
                    if key == write.key or (write.prefix and key.startswith(write.key))
                ]:
                    del self._items[key]
                    self.history.append(Deletion(key, self._revision))
                continue
            before = self._items.get(write.key)
            created = before.create_revision if before else self._revision
            lease_id = before.lease_id if before and write.lease_id is None else write.lease_id or 0
            self._items[write.key] = KeyValue(
                write.key, write.value, created, self._revision, lease_id
            )
            self.history.append(self._items[write.key])


class FakeKeyWatch(KeyWatch):
    """Knows the history of the fake at once, and breaks when that is away or has another store."""

    def __init__(self, etcd: FakeEtcd, key: str) -> None:
        super().__init__(etcd, key, lambda: None)
        self._fake = etcd
        self._store = 0  # that is watched
        self.hears = True  # else what it watches is a member that is far behind

    def begin(self, revision: int) -> None:
        if self._fake.available and not self._fake.refuse_to_watch:
            self._store = self._fake.stores

    @property
    def stands(self) -> bool:
        if not self._fake.available:
            self._store = 0
        return self._store == self._fake.stores

    def is_quiet(self, revision: int) -> bool:
        later = (
            change.key == self._key and change.mod_revision > revision
            for change in self._fake.history
        )
        return self.stands and not (self.hears and any(later))

    def end(self) -> None:
        self._store = 0
