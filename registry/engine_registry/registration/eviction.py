"""Ends the registrations of others as they were when they were read, several in one transaction.
Stateless.

Operators call it through `Registry.evict` and `evict_each`, and cleanup does. Each eviction leaves
a mark under `/evicted/` for a day, by which a keeper that was cut off from etcd learns that its
registration must not come back, and who has ended it.
"""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Collection, Sequence

from engine_registry.errors import EtcdFull, Evicted, RecordDamaged
from engine_registry.etcd.client import Etcd
from engine_registry.registration.writes import EVICTED, deletion, ended, made_at
from engine_registry.schema.eviction import Eviction, was_evicted
from engine_registry.schema.keys import evicted_key
from engine_registry.schema.keyvalue import Guard, KeyValue, Put, Range, unchanged, written
from engine_registry.schema.moment import utc
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import decode_item

_REGISTER_AGAIN = "the registration has ended; register again if that was not meant"
# Each takes two comparisons and two writes, and etcd takes 128 of either.
AT_ONCE = 40

_MARK_TTL_S = 24 * 3600  # outlives any outage that matters


def by_this_process(reason: str = "") -> Eviction:
    """An eviction that is made now. The user is that of the process, whatever its environment says.

    InvalidField where the reason is not one line of printable text, or too long.
    """
    return Eviction(this_user(), utc(), reason)


def this_user() -> str:
    """The user of this process and its host, such as `alice@node-9`."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def evict(etcd: Etcd, record: RankRecord, eviction: Eviction | None = None) -> bool:
    """Ends the registration that `record` was read from; False if it has changed or gone since."""
    return evict_each(etcd, [record], eviction)[0]


def evict_each(
    etcd: Etcd, records: Sequence[RankRecord], eviction: Eviction | None = None
) -> tuple[bool, ...]:
    """`evict` of several: of each, whether it was ended.

    Takes three requests for 40 records and one to read 128, unless one changes at the very moment.
    """
    if not all(record.mod_revision for record in records):
        raise ValueError("only a record that was read from etcd can be evicted")
    eviction = eviction or by_this_process()
    _, found = etcd.read([Range(record.key) for record in records])
    held = {
        _place(record): each.items[0]
        for record, each in zip(records, found, strict=True)
        if each.items and _is(each.items[0], record)
    }
    places, gone = list(held), set[tuple[str, int]]()
    for start in range(0, len(places), AT_ONCE):
        some = places[start : start + AT_ONCE]
        if evict_all(etcd, [held[place] for place in some], by=eviction):
            gone.update(some)
        else:  # one of them has changed, so each by itself
            gone.update(place for place in some if evict_all(etcd, [held[place]], by=eviction))
    return tuple(_place(record) in gone for record in records)


def _place(record: RankRecord) -> tuple[str, int]:
    return record.key, record.mod_revision


def evict_all(
    etcd: Etcd, items: Sequence[KeyValue], *conditions: Guard, by: Eviction | None = None
) -> bool:
    """Ends them all, or none where one has changed since it was read, or a condition does not hold.
    At most `AT_ONCE`.

    An etcd without space takes no mark, so only the keys go. The lease is left to the keeper: a
    missing key under a lease that lives is how it learns of the eviction. A keeper that is cut off
    until the lease has expired does not learn of it. Some versions of etcd (3.5.1, not 3.4.23) then
    refuse every transaction: that is EtcdFull, and nothing is done.
    """
    guards = [*map(unchanged, items), *conditions]
    mark_lease = 0
    try:
        mark_lease = etcd.grant(_MARK_TTL_S)
        marked = _mark(etcd, items, guards, mark_lease, by or by_this_process())
    except EtcdFull:
        if mark_lease:
            etcd.revoke(mark_lease)
        return _delete(etcd, items, guards)
    if not marked:
        etcd.revoke(mark_lease)
        return False
    if not _delete(etcd, marked, [*map(unchanged, marked)]):
        for each in marked:  # the keeper of one was faster, or a successor has its key
            _delete(etcd, [each], [unchanged(each)])
    return True


def why_gone(etcd: Etcd, record: RankRecord, former: Collection[str]) -> Evicted:
    """Who has ended this registration, which has had the `former` incarnations before: as the mark
    says, if there is one.
    """
    for incarnation in (record.incarnation, *former):
        mark = etcd.get(evicted_key(record.instance, record.rank, incarnation))
        if mark is not None:
            return was_evicted(record.key, Eviction.decode(mark.value), _REGISTER_AGAIN)
    return Evicted(
        f"{record.key} was deleted from etcd by somebody", _REGISTER_AGAIN, key=record.key
    )


def _is(item: KeyValue, record: RankRecord) -> bool:
    """Whether `record` was read from this.

    In a wiped store another's record may have come to the same revision.
    """
    try:
        return (
            item.mod_revision == record.mod_revision
            and decode_item(item).incarnation == record.incarnation
        )
    except RecordDamaged:
        return False


def _mark(
    etcd: Etcd,
    items: Sequence[KeyValue],
    guards: Sequence[Guard],
    lease_id: int,
    eviction: Eviction,
) -> list[KeyValue]:
    """The keys as they are once they say that they have ended; none where a guard does not hold."""
    puts = [ended(item, EVICTED, eviction) for item in items]
    marks = [Put(_mark_key(item), eviction.encode(), lease_id) for item in items]
    revision = etcd.commit(guards, [*puts, *marks]) or made_at(etcd, marks[0])
    return (
        [written(put, revision, item) for put, item in zip(puts, items, strict=True)]
        if revision
        else []
    )


def _mark_key(item: KeyValue) -> str:
    record = decode_item(item)
    return evicted_key(record.instance, record.rank, record.incarnation)


def _delete(etcd: Etcd, items: Sequence[KeyValue], guards: Sequence[Guard]) -> bool:
    return bool(etcd.commit(guards, [delete for item in items for delete in deletion(item)]))
