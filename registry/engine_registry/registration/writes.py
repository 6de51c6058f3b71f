"""The guarded writes of a registration: claim a rank, amend its record, end it. Stateless; keepers
and gateways call it.

Every write is a transaction that compares revisions, so that of two writers exactly one succeeds
and the other learns who it was. That siblings agree is kept by induction: a rank is only written
while one live sibling that it agrees with stands unchanged, or while there is none; so all that are
alive agree with each other, and one comparison is enough however many there are.

With its record a rank writes its entries in the index of holders, in the same transaction and
under the same lease. Only the writes of the rank itself change the index: an entry that is left
over leads to no record, and goes with its lease.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace

import tenacity

from engine_registry.errors import (
    EtcdFull,
    EtcdRefused,
    EtcdUnavailable,
    RecordDamaged,
    RegistryError,
)
from engine_registry.etcd.client import Etcd
from engine_registry.registration.checks import SIBLINGS, check_holder, check_siblings
from engine_registry.registration.entries import entry_deletions, moved_entries
from engine_registry.schema.eviction import Eviction, was_evicted
from engine_registry.schema.keys import (
    evicted_key,
    instance_prefix,
    manifest_part_key,
    manifest_prefix,
)
from engine_registry.schema.keyvalue import (
    Delete,
    KeyValue,
    Put,
    Range,
    Snapshot,
    absent,
    unchanged,
    under,
    written,
)
from engine_registry.schema.record import GATEWAY, RankRecord
from engine_registry.schema.record_format import decode_item, encode
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)

WITHDRAWN = "withdrawn"
DIED = "process ended"
EVICTED = "evicted"
# A rank that offered what an evicted source had brought. Its readers have bytes that do not
# count either.
SOURCE_EVICTED = "its source was evicted"
ENDINGS = (WITHDRAWN, DIED, EVICTED, SOURCE_EVICTED)  # all that a record's `ended` can say


class _Raced(RegistryError):
    """Another writer came between reading and writing."""


_until_settled = tenacity.retry(
    retry=tenacity.retry_if_exception_type(_Raced),
    stop=tenacity.stop_after_attempt(50),
    wait=tenacity.wait_random_exponential(multiplier=0.005, max=0.2),
    reraise=True,
)


def claim(
    etcd: Etcd,
    record: RankRecord,
    parts: Sequence[bytes],
    lease_id: int,
    replaces: str = "",
    former: Collection[str] = (),
) -> KeyValue:
    """Writes the manifest, then the record as the commit, all under the lease; returns the record's
    key as it is then.

    The key must be absent, ended, or hold this very incarnation, the one that it `replaces`, or one
    of the `former` ones of the same registration, none of which may have been evicted. Raises
    RankConflict, InstanceMismatch or Evicted.

    A record without `order` gets one, unless nobody loads from it but through a gateway, or etcd
    lets us write the record and not the index. Loaders find such a rank by reading all records.
    """
    last = _put_but_last(etcd, record, parts, lease_id)
    own = {record.incarnation, *former}
    try:
        if record.kept_by == GATEWAY:
            return _claim(etcd, record, last, lease_id, own, replaces, indexed=False)
        try:
            return _claim(etcd, record, last, lease_id, own, replaces, indexed=True)
        except EtcdRefused as exc:
            if exc.details.get("reason") != "denied":
                raise
            held = _claim(etcd, record, last, lease_id, own, replaces, indexed=False)
            log.warning(
                "%s is not in the index of holders, so loads that look for its model read all "
                "records: %s",
                record.key,
                exc,
                extra=fields("not_indexed", key=record.key, error=exc),
            )
            return held
    except _Raced as exc:
        raise EtcdUnavailable(
            f"cannot register {record.key}: too many others are registering at once", "try again"
        ) from exc


@_until_settled
def _claim(
    etcd: Etcd,
    record: RankRecord,
    last_part: Put,
    lease_id: int,
    own: Collection[str],
    replaces: str,
    indexed: bool,
) -> KeyValue:
    siblings = under(instance_prefix(record.instance), SIBLINGS)
    marks = [evicted_key(record.instance, record.rank, incarnation) for incarnation in own]
    revision, (held, some, *evicted) = etcd.read([Range(record.key), siblings, *map(Range, marks)])
    # An eviction from now on, of whichever incarnation, changes the key.
    for mark in [item for each in evicted for item in each.items]:
        raise was_evicted(record.key, Eviction.decode(mark.value))
    holder = next(iter(held.items), None)
    guards = [
        check_holder(etcd, record, holder, {*own, replaces}),
        absent(evicted_key(record.instance, record.rank, record.incarnation)),
    ]
    if not record.ended:  # else it is held, and another launch may have its siblings' places
        guards.append(check_siblings(etcd, record, Snapshot(revision, some.items)))
    order = record.order or _order_of(holder, record.incarnation) or revision
    record = replace(record, order=order if indexed else 0)
    put = Put(record.key, encode(record), lease_id)
    entries = moved_entries(holder, record, lease_id) if indexed else []
    revision = etcd.commit(guards, [last_part, put, *entries])
    if not revision:
        raise _Raced(f"{record.key} or a sibling changed while it was being registered")
    return written(put, revision, holder)


def _order_of(holder: KeyValue | None, incarnation: str) -> int:
    """That of our own claim before this one, whose answer was lost; else 0."""
    found = decode_item(holder) if holder is not None else None
    return found.order if found is not None and found.incarnation == incarnation else 0


def amend(
    etcd: Etcd, record: RankRecord, held: KeyValue, parts: Sequence[bytes] = ()
) -> KeyValue | None:
    """Writes the changed record over `held`, under its lease: the key then, or None where another
    was faster.

    With `parts`, the record has another incarnation and this manifest. They are in etcd together,
    or neither is, and the former manifest is gone then.
    """
    put = Put(record.key, encode(record), held.lease_id)
    changes: list[Put | Delete] = [put, *moved_entries(held, record, held.lease_id)]
    if parts:
        changes.append(_put_but_last(etcd, record, parts, held.lease_id))
        former = decode_item(held)
        if former.incarnation != record.incarnation:
            prefix = manifest_prefix(former.instance, former.rank, former.incarnation)
            changes.append(Delete(prefix, prefix=True))
    revision = etcd.commit([unchanged(held)], changes)
    return written(put, revision, held) if revision else None


def end(etcd: Etcd, held: KeyValue, reason: str) -> None:
    """Deletes all that the registration has in etcd. LeaseNotFound if the lease has expired, and
    its keys with it.

    The record is marked as ended first: watchers so know at once that this is no blip, and why it
    happened.
    """
    lease_id, put = held.lease_id, ended(held, reason)
    with contextlib.suppress(
        EtcdRefused
    ):  # an etcd without space takes no mark, but lets go of leases
        revision = etcd.commit([unchanged(held)], [put, *entry_deletions(held)])
        held = written(put, revision, held) if revision else held
    try:
        etcd.revoke(lease_id)
    except EtcdRefused:
        # Another's key hangs on the lease: we may not write it, and it goes when the lease expires.
        _delete(etcd, held)


def remove(etcd: Etcd, record: RankRecord, reason: str) -> None:
    """As `end`, for a caller that does not know the lease: whatever stands under the record's key,
    if it is of this registration.
    """
    found = etcd.get(record.key)
    if found is None:
        return
    try:
        ours = decode_item(found).incarnation == record.incarnation
    except RecordDamaged:
        return
    if not ours:
        return
    put = ended(found, reason)
    try:
        revision = etcd.commit([unchanged(found)], [put]) or made_at(etcd, put)
        if revision:
            _delete(etcd, written(put, revision, found))
    except EtcdFull:
        etcd.revoke(found.lease_id)


def ended(held: KeyValue, reason: str, eviction: Eviction | None = None) -> Put:
    """Says in the record that it has ended, and why, and is no longer held."""
    record = replace(decode_item(held), ended=reason, eviction=eviction, held_until="")
    return Put(held.key, encode(record), None)


def made_at(etcd: Etcd, put: Put) -> int:
    """The revision at which our own put was made, or 0: a guard also fails where a first try
    succeeded and its answer was lost.

    A put is ours by its value, and by its lease where it gives one.
    """
    found = etcd.get(put.key)
    ours = found is not None and found.value == put.value and put.lease_id in (None, found.lease_id)
    return found.mod_revision if found is not None and ours else 0


def deletion(held: KeyValue) -> list[Delete]:
    """Of the record and of its manifest."""
    record = decode_item(held)
    parts = manifest_prefix(record.instance, record.rank, record.incarnation)
    return [Delete(held.key), Delete(parts, prefix=True)]


def _delete(etcd: Etcd, held: KeyValue) -> None:
    etcd.commit([unchanged(held)], [*deletion(held), *entry_deletions(held)])


def _put_but_last(etcd: Etcd, record: RankRecord, parts: Sequence[bytes], lease_id: int) -> Put:
    """Writes the parts of a manifest but for the last one, which goes with the record."""
    *first, last = [
        Put(_part_key(record, number), part, lease_id) for number, part in enumerate(parts)
    ]
    for put in first:
        etcd.commit([], [put])
    return last


def _part_key(record: RankRecord, number: int) -> str:
    return manifest_part_key(record.instance, record.rank, record.incarnation, number)
