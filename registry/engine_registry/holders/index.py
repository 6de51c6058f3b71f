"""Reads of the index of holders: entries, and the records that they lead to. Stateless.

No read brings more than a page, however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from engine_registry.errors import EtcdRefused, RecordDamaged
from engine_registry.etcd.client import Etcd
from engine_registry.schema.holder import Entry, holders_prefix, parse_entry
from engine_registry.schema.keys import ENGINES, HOLDERS, NEAR_HOLDERS, pulls_prefix
from engine_registry.schema.keyvalue import KeyValue, Range, end_of, under
from engine_registry.schema.record import ModelIdentity, RankRecord, RankState
from engine_registry.schema.record_format import decode_item

SAMPLE = 8  # ranks of one state that are looked at, where there are more
_PAGE = 64


@dataclass(frozen=True)
class Read:
    """Records, and how many loads read from each, by incarnation; None where we may not see that.
    `revision` is etcd's.
    """

    records: list[RankRecord]
    readers: Mapping[str, int] | None
    revision: int


def is_complete(etcd: Etcd) -> bool:
    """Whether each record has an entry, as far as their numbers say: then nobody is missed."""
    _, (records, entries) = etcd.read(
        [under(ENGINES, count_only=True), Range(HOLDERS, NEAR_HOLDERS, count_only=True)]
    )
    return records.count == entries.count


def pages(
    etcd: Etcd, model: ModelIdentity, rank: int, state: RankState, version: int | None
) -> Iterator[list[Entry]]:
    """All entries in the state, the newest version first."""
    prefix = holders_prefix(model, rank, state, version)
    start, end = prefix, end_of(prefix)
    while True:
        _, (found,) = etcd.read([Range(start, end, _PAGE)])
        yield entries_of(found.items)
        if found.count <= len(found.items):
            return
        start = found.items[-1].key + "\0"


def entries_of(items: Iterable[KeyValue]) -> list[Entry]:
    """What can be read of them."""
    return [entry for item in items if (entry := parse_entry(item)) is not None]


def read(etcd: Etcd, entries: Sequence[Entry]) -> Read:
    """The records that the entries lead to, in their order, and the numbers of their readers, in
    one request. What has changed since its entry was read is left out, and what is damaged.
    """
    if not entries:
        return Read([], {}, 0)
    records = [Range(entry.record_key) for entry in entries]
    tickets = [under(_pulls_of(entry.record_key), count_only=True) for entry in entries]
    try:
        revision, found = etcd.read([*records, *tickets])
    except EtcdRefused as exc:
        if exc.details.get("reason") != "denied":
            raise
        revision, found = etcd.read(records)  # a user that may not see tickets
    some: list[RankRecord] = []
    readers: dict[str, int] = {}
    for number, entry in enumerate(entries):
        for item in found[number].items:
            record = _record(item)
            if record is not None and record.incarnation == entry.incarnation:
                some.append(record)
                if len(found) > len(records):
                    readers[record.incarnation] = found[len(records) + number].count
    return Read(some, readers if len(found) > len(records) else None, revision)


def read_all(etcd: Etcd) -> list[RankRecord]:
    """Every record that can be read and has not ended, whether it is in the index or not."""
    items = etcd.snapshot(ENGINES).items
    return [record for item in items if (record := _record(item)) is not None]


def _record(item: KeyValue) -> RankRecord | None:
    try:
        record = decode_item(item)
    except RecordDamaged:
        return None
    return None if record.ended else record


def _pulls_of(record_key: str) -> str:
    instance, _, rank = record_key.removeprefix(ENGINES).partition("/")
    return pulls_prefix(instance, int(rank))
