"""Checks the history of one rank's key, as etcd reports it: who held the rank when, and whether
anybody held it who must not have.

A history is what a watcher of the records and of the marks of evictions has seen, in the order of
revisions. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine_registry.schema.keys import parse_record_key
from engine_registry.schema.keyvalue import Change, KeyValue
from engine_registry.schema.record_format import decode_item

EVICTED = "/evicted/"


@dataclass(frozen=True)
class Step:
    """What stood under the key from a revision on: somebody's live record, a record that says that
    it has ended, or nothing.
    """

    revision: int
    holder: str = ""  # the incarnation
    ended: str = ""


def steps(changes: Iterable[Change], key: str) -> list[Step]:
    found = []
    for change in changes:
        if change.key != key:
            continue
        if isinstance(change, KeyValue):
            record = decode_item(change)
            found.append(Step(change.mod_revision, record.incarnation, record.ended))
        else:
            found.append(Step(change.mod_revision))
    return found


def evictions(changes: Iterable[Change], key: str) -> dict[str, int]:
    """The revision at which each incarnation was evicted."""
    instance, rank = parse_record_key(key) or ("", 0)
    prefix = f"{EVICTED}{instance}/{rank}/"
    puts = [
        change
        for change in changes
        if isinstance(change, KeyValue) and change.key.startswith(prefix)
    ]
    return {put.key.removeprefix(prefix): put.mod_revision for put in puts}


def faults(changes: Iterable[Change], key: str) -> list[str]:
    """Each breach of mutual exclusion, and each return of a registration that was evicted."""
    changes = list(changes)
    evicted = evictions(changes, key)
    found: list[str] = []
    holder, over = "", True
    before: set[str] = set()  # who held the rank until another did
    for step in steps(changes, key):
        if step.ended and step.holder != holder:
            found.append(f"{step.revision}: the end of {step.holder} stands over {holder}")
        if step.ended or not step.holder:
            over = True
            continue
        if step.holder != holder:
            if not over:
                found.append(
                    f"{step.revision}: {step.holder} took the rank from {holder}, which had "
                    "not ended"
                )
            before.add(holder)
            if step.holder in before:
                found.append(
                    f"{step.revision}: {step.holder} is back after another has held the rank"
                )
        if step.revision > evicted.get(step.holder, step.revision):
            found.append(f"{step.revision}: {step.holder} is back after it was evicted")
        holder, over = step.holder, False
    return found
