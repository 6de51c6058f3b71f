"""Takes tickets to read from ranks. Used by `Registry`, for loads.

A ticket is only issued while the record stands as the loader knows it, so a rank that has begun to
leave sees every ticket that there will ever be. The transaction that writes the tickets decides
that. It also reads what the loader needs next: the records, to watch them from then on; or, where
it is refused, how many read from each rank that may be chosen instead.
"""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from engine_registry.errors import EtcdError, EtcdRefused, LeaseNotFound
from engine_registry.etcd.client import MAX_OPERATIONS, Etcd
from engine_registry.pulls import ticket
from engine_registry.pulls.ticket import PullTicket
from engine_registry.schema.keys import pulls_prefix
from engine_registry.schema.keyvalue import (
    Found,
    Outcome,
    Put,
    Range,
    Snapshot,
    at_revision,
    none_created_since,
    under,
)
from engine_registry.schema.moment import utc
from engine_registry.schema.pull_ticket import Pull, Reader, encode
from engine_registry.schema.record import RankRecord

_AT_ONCE = 32  # tickets in one transaction
FEW = 8  # records that are read with their tickets


@dataclass(frozen=True)
class Taken:
    """What became of the tickets that were asked for.

    Attributes:
        ticket: Those that were given. None where none was.
        records: Of the ranks that it is for.
        snapshot: These records, as they stood when the tickets were written. None of many.
        faster: Incarnations of those that stand as they were, but another load has begun to read.
        readers: Where a ticket was refused, how many loads read then from each rank `among` those
            that were asked about, by incarnation. None where one of these has changed.
        revision: At which they were counted.
    """

    ticket: PullTicket | None
    records: tuple[RankRecord, ...]
    snapshot: Snapshot | None = None
    faster: frozenset[str] = frozenset()
    readers: Mapping[str, int] | None = None
    revision: int = 0


class Pulling:
    """Takes tickets for one load, whose attempts follow each other. A lease that was granted for
    tickets that were refused is for the next ones.
    """

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd
        self._lease_id = 0  # on which nothing hangs

    def take(
        self,
        records: Sequence[RankRecord],
        reader: RankRecord | None = None,
        free_since: int | None = None,
        among: Sequence[RankRecord] = (),
    ) -> Taken:
        """Tickets to read from those of the ranks whose records are what they were when `records`
        were read; with `free_since`, a revision, only where no other load has taken a ticket to
        read from the rank since. A refused one keeps none of the others back.

        `reader` is the rank that is filled, if it is registered. Raises an EtcdError.
        """
        left_over = self._lease_id
        try:
            return self._take(records, reader, free_since, among)
        except EtcdRefused:
            self.close()  # some of the tickets may hang on the lease
            raise
        except EtcdError as exc:
            self._lease_id = 0  # what may hang on it goes when it expires
            if not (left_over and isinstance(exc, LeaseNotFound)):
                raise
        return self._take(records, reader, free_since, among)

    def _take(
        self,
        records: Sequence[RankRecord],
        reader: RankRecord | None,
        free_since: int | None,
        among: Sequence[RankRecord],
    ) -> Taken:
        self._lease_id = self._lease_id or self._etcd.grant(ticket.TTL_S)
        if 1 + 2 * min(len(records), _AT_ONCE) + 2 * len(among) > MAX_OPERATIONS:
            among = ()
        asked = _Asked(self._etcd, self._lease_id, reader, free_since, among)
        for start in range(0, len(records), _AT_ONCE):
            asked.take(records[start : start + _AT_ONCE])
        held = None
        if asked.given:
            pulls = [pull for _, pull in asked.given]
            held, self._lease_id = PullTicket(self._etcd, self._lease_id, pulls), 0
        return Taken(
            held,
            tuple(record for record, _ in asked.given),
            asked.snapshot if len(asked.given) <= FEW else None,
            frozenset(asked.faster),
            asked.readers,
            asked.revision,
        )

    def close(self) -> None:
        """Any number of times. Tickets that were given stay."""
        lease_id, self._lease_id = self._lease_id, 0
        if lease_id:
            with contextlib.suppress(EtcdError):  # it expires
                self._etcd.revoke(lease_id)


def take_ticket(
    etcd: Etcd,
    record: RankRecord,
    reader: RankRecord | None = None,
    free_since: int | None = None,
) -> PullTicket | None:
    """One ticket, as `Pulling.take` gives it, or None."""
    with contextlib.closing(Pulling(etcd)) as pulling:
        return pulling.take([record], reader, free_since).ticket


@dataclass
class _Asked:
    """One question for tickets, in as many transactions as it takes."""

    etcd: Etcd
    lease_id: int
    reader: RankRecord | None
    free_since: int | None
    among: Sequence[RankRecord]
    given: list[tuple[RankRecord, Pull]] = field(default_factory=list)
    snapshot: Snapshot | None = None
    faster: set[str] = field(default_factory=set)
    readers: Mapping[str, int] | None = None
    revision: int = 0

    def take(self, records: Sequence[RankRecord]) -> None:
        """Asks again without those that were refused, until the others have theirs."""
        load_id = uuid.uuid4().hex
        while records:
            pulls = [self._pull(record, load_id) for record in records]
            outcome = self._commit(records, pulls)
            if outcome.done:
                items = tuple(item for each in outcome.found for item in each.items)
                self.snapshot = Snapshot(outcome.revision, items) if items else None
            elif not outcome.found[0].items:
                records = self._not_refused(records, outcome)
                continue
            # else our own ticket is there: the first try had succeeded, and its answer was lost
            self.given += zip(records, pulls, strict=True)
            return

    def _pull(self, record: RankRecord, load_id: str) -> Pull:
        return Pull(
            record.instance,
            record.rank,
            record.incarnation,
            # nobody else has it: a guard on the key would only make a lost answer look like a
            # refusal
            load_id,
            # a name may hold bytes that are no text, which JSON has no form for
            host=socket.gethostname().encode(errors="replace").decode(),
            pid=os.getpid(),
            reader=Reader.of(self.reader) if self.reader is not None else None,
            began_at=utc(),
            content=record.content,
        )

    def _commit(self, records: Sequence[RankRecord], pulls: Sequence[Pull]) -> Outcome:
        """All tickets. Where they are refused it finds our own first one, the records, the new
        tickets of others, and of the ranks `among` the records and how many read from each.
        """
        # A wiped store may hold another's record at that revision: then the header shows it.
        guards = [at_revision(record.key, record.mod_revision) for record in records]
        new: list[Range] = []
        if self.free_since is not None:
            since = self.free_since
            guards += [none_created_since(_pulls_of(record), since) for record in records]
            new = [
                replace(under(_pulls_of(record), 1), keys_only=True, created_after=since)
                for record in records
            ]
        stand = [Range(record.key, keys_only=True) for record in [*records, *self.among]]
        reads = [Range(pulls[0].key, keys_only=True), *stand, *new]
        reads += [under(_pulls_of(record), count_only=True) for record in self.among]
        return self.etcd.decide(
            guards,
            [Put(pull.key, encode(pull), self.lease_id) for pull in pulls],
            then=[Range(record.key) for record in records] if len(records) <= FEW else [],
            otherwise=reads,
        )

    def _not_refused(self, records: Sequence[RankRecord], outcome: Outcome) -> list[RankRecord]:
        """And counts who reads from those `among`, as far as they stand."""
        found, count, others = outcome.found[1:], len(records), len(self.among)
        stand = list(map(_stands, [*records, *self.among], found))
        new = found[count + others : len(found) - others]
        counted = found[len(found) - others :]
        self.readers = None
        if self.among and all(stand[count:]):
            self.readers = {
                record.incarnation: each.count
                for record, each in zip(self.among, counted, strict=True)
            }
        self.revision = outcome.revision
        some = []
        for number, record in enumerate(records):
            if stand[number] and new and new[number].items:
                self.faster.add(record.incarnation)
            elif stand[number]:
                some.append(record)
        return some if len(some) < count else []


def _stands(record: RankRecord, found: Found) -> bool:
    return [item.mod_revision for item in found.items] == [record.mod_revision]


def _pulls_of(record: RankRecord) -> str:
    return pulls_prefix(record.instance, record.rank)
