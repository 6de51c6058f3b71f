"""The words of the etcd adapter: keys with their revisions, changes, guards and writes of a transaction. Pure."""

from __future__ import annotations

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
    """What happened after the batch before, up to and including `revision`."""

    revision: int
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Guard:
    """A condition of a transaction; make one with the functions below."""

    key: str
    target: str
    result: str
    value: int
    prefix: bool = False


def absent(key: str) -> Guard:
    return Guard(key, "create_revision", "EQUAL", 0)


def present(key: str) -> Guard:
    return Guard(key, "create_revision", "GREATER", 0)


def unchanged(key: str, mod_revision: int) -> Guard:
    return Guard(key, "mod_revision", "EQUAL", mod_revision)


def none_created_since(prefix: str, revision: int) -> Guard:
    """No key under the prefix was created after `revision`."""
    return Guard(prefix, "create_revision", "LESS", revision + 1, prefix=True)


@dataclass(frozen=True)
class Put:
    """`lease_id` None keeps the lease that the key has."""

    key: str
    value: bytes
    lease_id: int | None


@dataclass(frozen=True)
class Delete:
    key: str
    prefix: bool = False
