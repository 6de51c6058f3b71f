"""The words of the etcd adapter: keys with their revisions, changes, guards and writes of a
transaction. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class KeyValue:
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: int


@dataclass(frozen=True)
class Deletion:
    key: str
    mod_revision: int


Change = KeyValue | Deletion


@dataclass(frozen=True)
class Snapshot:
    """All that lay under a prefix at one revision, in the order of the keys."""

    revision: int
    items: tuple[KeyValue, ...]


@dataclass(frozen=True)
class Batch:
    """What happened after the batch before, up to and including `revision`; of several watches on
    one stream, after the batch before of the same `watch`.
    """

    revision: int
    changes: tuple[Change, ...]
    watch: int = 0


@dataclass(frozen=True)
class Range:
    """Keys to read: the one of that name; or with `end`, all from `key` on that come before `end`.

    With `limit` no more than so many, the first ones; with `count_only` none, only how many there
    are; with `keys_only` they come without their values; with `created_after`, a revision, only
    those that are newer.
    """

    key: str
    end: str = ""
    limit: int = 0
    count_only: bool = False
    keys_only: bool = False
    created_after: int = 0


@dataclass(frozen=True)
class Found:
    """What a `Range` has brought, and how many keys there are in it in all, also older ones."""

    items: tuple[KeyValue, ...]
    count: int


@dataclass(frozen=True)
class Outcome:
    """Of a transaction: whether its guards held, at which revision, and what it has read then."""

    done: bool
    revision: int
    found: Sequence[Found]


def under(prefix: str, limit: int = 0, count_only: bool = False) -> Range:
    """All keys with the prefix, whose last character is ASCII."""
    return Range(prefix, end_of(prefix), limit, count_only)


def end_of(prefix: str) -> str:
    """The first key after all with the prefix, whose last character is ASCII."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


@dataclass(frozen=True)
class Guard:
    """A condition of a transaction; make one with the functions below."""

    key: str
    target: str
    result: str
    value: int
    prefix: bool = False
    content: bytes | None = None  # if given, the key must hold that as well


def absent(key: str) -> Guard:
    return Guard(key, "create_revision", "EQUAL", 0)


def present(key: str) -> Guard:
    return Guard(key, "create_revision", "GREATER", 0)


def unchanged(item: KeyValue) -> Guard:
    """The key holds what it held.

    A wiped store counts its revisions from 1 again, so a revision alone proves nothing.
    """
    return Guard(item.key, "mod_revision", "EQUAL", item.mod_revision, content=item.value)


def at_revision(key: str, mod_revision: int) -> Guard:
    """For a caller that does not know the value, and does no harm if it meets another's in a wiped
    store.
    """
    return Guard(key, "mod_revision", "EQUAL", mod_revision)


def none_created_since(prefix: str, revision: int) -> Guard:
    """No key under the prefix was created after `revision`."""
    return Guard(prefix, "create_revision", "LESS", revision + 1, prefix=True)


def none_changed_since(prefix: str, revision: int) -> Guard:
    """No key that is under the prefix was written after `revision`. It says nothing of keys that
    were there and are not any more.
    """
    return Guard(prefix, "mod_revision", "LESS", revision + 1, prefix=True)


@dataclass(frozen=True)
class Put:
    """`lease_id` None keeps the lease that the key has."""

    key: str
    value: bytes
    lease_id: int | None


def written(put: Put, revision: int, before: KeyValue | None = None) -> KeyValue:
    """The key as it is after that put, which a transaction made at that revision; `before` is what
    stood there.
    """
    created = before.create_revision if before is not None else revision
    lease_id = before.lease_id if put.lease_id is None and before is not None else put.lease_id or 0
    return KeyValue(put.key, put.value, created, revision, lease_id)


@dataclass(frozen=True)
class Delete:
    key: str
    prefix: bool = False
