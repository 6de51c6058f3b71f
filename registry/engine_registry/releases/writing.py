"""Releases a version of an instance: a guarded write, as soon as every rank holds the version.

The transaction compares three things: the release that was there; the record whose lease the
release gets; and that no record of the instance was written after the revision up to which all of
them are known. The last one is a single comparison over a range of keys, however many ranks there
are; etcd takes 128 of a transaction. So of two writers one succeeds, and whatever rank goes on from
the version before the write makes it fail.

A comparison over a range does not see keys that were deleted: a rank may be gone by the moment of
the write. That does no harm. It held the version up to its end, and its end a moment after the
write would leave the same in etcd: the instance is degraded either way. A rank that comes back has
written its record, so the write fails.

Used by `client`. Runs in the caller's thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from engine_registry.collector import collector_paused
from engine_registry.errors import (
    EtcdUnavailable,
    InstanceNotFound,
    InvalidField,
    LeaseNotFound,
    RecordDamaged,
    RegistryError,
    ReleaseIncomplete,
    SchemaUnsupported,
)
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.registration.eviction import this_user
from engine_registry.schema.holder import model_digest
from engine_registry.schema.keys import instance_prefix, record_key, release_key
from engine_registry.schema.keyvalue import (
    Batch,
    KeyValue,
    Put,
    Range,
    Snapshot,
    absent,
    none_changed_since,
    unchanged,
)
from engine_registry.schema.moment import utc
from engine_registry.schema.printable import short
from engine_registry.schema.release import Release, decode_release, digest_of
from engine_registry.schema.roster import Roster
from engine_registry.schema.status import InstanceStatus, named

_TRIES = 20  # of a write, or a look without waiting, that another writer comes before
_MAX_NAMED = 8  # reasons in a message


@dataclass(frozen=True)
class Order:
    """What is to be released.

    Attributes:
        instance: The instance.
        version: The version.
        rank: The rank whose lease the release gets.
        back: Whether the version may be older than the released one.
        former: The release of this version that we have made before. It gets the lease that the
            rank has now, unless another was made since.
    """

    instance: str
    version: int
    rank: int = 0
    back: bool = False
    former: Release | None = None


def release(etcd: Etcd, order: Order, timeout_s: float) -> Release:
    """The release, by us or by another who was faster, once every rank holds the version.

    Raises ReleaseIncomplete, InstanceNotFound, InvalidField where a newer version is released or
    there is no such rank, and what etcd refuses.
    """
    start = time.monotonic()
    follower = Follower(etcd, instance_prefix(order.instance), start + timeout_s)
    roster: Roster | None = None
    for update in _updates(etcd, order.instance, follower if timeout_s > 0 else None):
        if roster is None or isinstance(update, Snapshot):
            roster = Roster(order.instance)
        _take_in(roster, update)
        if roster.holds(order.version):
            made = _write(etcd, order, roster, update.revision)
            if made is not None:
                return made
        elif timeout_s <= 0 or _is_past(roster, order.version):
            break
    waited_s = min(timeout_s, time.monotonic() - start)
    if roster is None:
        raise follower.last_error or EtcdUnavailable(f"etcd has not answered in {waited_s:.3g} s")
    raise _why_not(roster, order.version, waited_s)


@collector_paused
def _take_in(roster: Roster, update: Snapshot | Batch) -> None:
    for change in update.items if isinstance(update, Snapshot) else update.changes:
        roster.see(change)


def _updates(etcd: Etcd, instance: str, follower: Follower | None) -> Iterator[Snapshot | Batch]:
    """What there is, and what changes; without a follower what there is, a few times."""
    if follower is not None:
        yield from follower
        return
    for _ in range(_TRIES):
        yield etcd.snapshot(instance_prefix(instance))


def _write(etcd: Etcd, order: Order, roster: Roster, known_at: int) -> Release | None:
    """None where a record has changed after the revision `known_at`."""
    instance, version = order.instance, order.version
    made = _made_of(roster.status(), version)
    if order.former is not None:
        if order.former.digest != made.digest:
            raise ReleaseIncomplete(
                f"version {version} of {instance!r} is not what was released by that number",
                "release it anew",
                instance=instance,
                version=version,
                ranks={},
                problems=[],
            )
        made = order.former
    if order.rank >= len(roster.records):
        raise InvalidField(f"{instance!r} has no rank {order.rank}", field="rank")
    key, lessor = Range(release_key(instance)), Range(record_key(instance, order.rank))
    _, (standing, own) = etcd.read([key, lessor])
    none_has_gone_on = none_changed_since(instance_prefix(instance), known_at)
    for _ in range(_TRIES):
        if not own.items:
            return None
        lease_id = own.items[0].lease_id
        guards = [unchanged(own.items[0]), none_has_gone_on, absent(key.key)]
        if standing.items:
            held = standing.items[0]
            guards[-1] = unchanged(held)
            before = _read(held)
            if before is not None and _is_done(order, before, made, held.lease_id == lease_id):
                return before
            if before is not None and before.version > version and not order.back:
                raise InvalidField(
                    f"version {version} of {instance!r} is older than version {before.version}, "
                    "which is released",
                    "release a newer one, or say `Registry.rollback`",
                    field="version",
                )
        try:
            outcome = etcd.decide(guards, [Put(key.key, made.encode(), lease_id)], otherwise=[key])
        except LeaseNotFound:  # so the record is gone
            return None
        if outcome.done:
            return made
        if outcome.found[0].items == standing.items:
            return None
        standing = outcome.found[0]
    raise EtcdUnavailable(
        f"cannot release version {version} of {instance!r}: too many others release versions of "
        "it at once",
        "try again",
    )


def _made_of(status: InstanceStatus, version: int) -> Release:
    """Of an instance all of whose ranks hold the version."""
    records = status.as_of(version).records
    contents = tuple(record.content for record in records)
    model, at = model_digest(records[0].model), utc()
    return Release(status.instance, version, digest_of(contents), model, at, this_user(), contents)


def _is_done(order: Order, before: Release, made: Release, same_lease: bool) -> bool:
    """Whether what stands is what is wanted."""
    if order.former is not None:  # else another was made since
        return same_lease or before.encode() != made.encode()
    return (before.version, before.digest) == (made.version, made.digest)


def _read(held: KeyValue) -> Release | None:
    """None where it is damaged, and so may be replaced. SchemaUnsupported."""
    try:
        return decode_release(held)
    except SchemaUnsupported:
        raise
    except RecordDamaged:
        return None


def _is_past(roster: Roster, version: int) -> bool:
    """Whether a rank has gone on from it and does not have it any more: waiting does not help."""
    return any(
        record.version > version and record.as_of(version) is None
        for record in roster.records.values()
    )


def _why_not(roster: Roster, version: int, waited_s: float) -> RegistryError:
    instance, waited = roster.instance, f" after {waited_s:.3g} s" if waited_s > 0 else ""
    lacking = roster.lacking(version)
    status = roster.status()
    if not status.records and not status.problems:
        return InstanceNotFound(
            f"instance {instance!r} is not registered{waited}",
            "start its ranks, or see `Registry.instances()`",
            instances=[instance],
        )
    by_reason: dict[str, list[int]] = {}
    for rank, why in lacking.items():
        by_reason.setdefault(why, []).append(rank)
    some = [f"{named(ranks)} ({why})" for why, ranks in list(by_reason.items())[:_MAX_NAMED]]
    # or they disagree, a record is damaged, or they change without end
    problems = [short(problem) for problem in status.problems[:_MAX_NAMED]]
    return ReleaseIncomplete(
        f"version {version} of {instance!r} is not released{waited}: "
        + (
            f"it is kept back by {', '.join(some)}"
            if some
            else "; ".join(problems) or "its ranks change all the time"
        ),
        "let each of these ranks publish the version, or release one that all have",
        instance=instance,
        version=version,
        ranks=lacking,
        problems=list(status.problems),
    )
