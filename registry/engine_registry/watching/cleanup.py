"""Evicts what a dead rank leaves useless: the other ranks of an instance that stays degraded for
longer than a grace period.

`CleaningWatch` is a Watch that carries out what `Grace` decides, if it leads: of several that run,
one evicts. Every eviction is guarded by the record, so it can only hit what was seen, and by the
absence of a rank, so it spares an instance that is complete.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from engine_registry import failpoints
from engine_registry.errors import EtcdError, EtcdUnavailable, RecordDamaged
from engine_registry.etcd.client import Etcd
from engine_registry.lifetime import Closable
from engine_registry.registration.eviction import AT_ONCE, by_this_process, evict_all
from engine_registry.schema.eviction import Eviction
from engine_registry.schema.eviction_note import EvictionNote
from engine_registry.schema.keys import eviction_note_key, instance_prefix, record_key
from engine_registry.schema.keyvalue import Guard, KeyValue, Put, absent, unchanged
from engine_registry.schema.record import RankRecord
from engine_registry.schema.roster import assess_all
from engine_registry.schema.status import InstanceStatus
from engine_registry.telemetry.logs import fields
from engine_registry.watching.election import Election
from engine_registry.watching.events import Event
from engine_registry.watching.grace_period import DueEviction, Grace
from engine_registry.watching.watch import Watch

log = logging.getLogger(__name__)
_NOTE_TTL_S = 3600.0  # beyond the grace period: for how long no watcher need run
_NOTE_WAIT_S = 1.0


@dataclass(frozen=True)
class InstanceCleaned:
    """`evicted` are the registrations that were ended, or with `dry_run` would be.

    `lost` is the rank whose loss began it.
    """

    instance: str
    lost: RankRecord
    evicted: tuple[RankRecord, ...]
    dry_run: bool


class CleaningWatch(Closable):
    """Iterate as over a Watch; in between comes an InstanceCleaned for every instance that this
    process has cleaned up.
    """

    def __init__(
        self, etcd: Etcd, watch: Watch, election: Election, grace_s: float, dry_run: bool
    ) -> None:
        """`etcd` is the watch's: its calls end when the watch stops."""
        self._etcd = etcd
        self._watch = watch
        self._election = election
        self._grace_s = grace_s
        self._grace = Grace(grace_s)
        self._dry_run = dry_run
        self._mark_open()

    def __iter__(self) -> Iterator[Event | InstanceCleaned]:
        while not self._watch.stopped:
            event = self._watch.next(self._wait_s())
            if event is not None:
                self._grace.feed(event, time.monotonic())
            self._write_notes()  # before the loss is reported
            if event is not None:
                yield event
            for eviction in self._grace.expired(time.monotonic()):
                if self._dry_run or self._election.leading:
                    yield from self._clean(eviction)

    def _wait_s(self) -> float | None:
        due = self._grace.due
        if due is None:
            return None
        wait_s = max(0.0, due - time.monotonic())
        return min(wait_s, _NOTE_WAIT_S) if self._grace.has_notes else wait_s

    def _write_notes(self) -> None:
        """Only the leader writes them: the other watchers have seen the losses themselves."""
        while self._election.leading and (note := self._grace.next_note()) is not None:
            instance = note.lost.instance
            try:
                lease_id = self._etcd.grant(self._grace_s + _NOTE_TTL_S)
                self._etcd.commit([], [Put(eviction_note_key(instance), note.encode(), lease_id)])
            except EtcdError as exc:
                if not self._watch.stopped:
                    log.warning(
                        "a watcher that starts from now on will not clean up %s: %s",
                        instance,
                        exc,
                        extra=fields("note_not_written", instance=instance, error=exc),
                    )

    def _read_note(self, instance: str) -> EvictionNote | None:
        found = self._etcd.get(eviction_note_key(instance))
        try:
            return EvictionNote.decode(found.key, found.value) if found else None
        except RecordDamaged as exc:
            log.warning(
                "%s is not cleaned up: %s",
                instance,
                exc,
                extra=fields("note_damaged", instance=instance),
            )
            return None

    def _clean(self, eviction: DueEviction) -> Iterator[InstanceCleaned]:
        evicted: list[RankRecord] = []
        lost, incarnations = eviction.lost, eviction.incarnations
        try:
            if eviction.unseen and (note := self._read_note(eviction.instance)) is not None:
                lost, incarnations = lost or note.lost, incarnations | note.incarnations
            items = self._etcd.snapshot(instance_prefix(eviction.instance)).items
            (status,) = assess_all(items) or (None,)
            why = f"rank {lost.rank} did not come back" if lost else ""
            by = by_this_process(f"{why} within {self._grace_s:g} s" if why else "")
            if status is None or self._evict(
                status, {item.key: item for item in items}, incarnations, evicted, by
            ):
                self._grace.settle(eviction)
        except EtcdError as exc:  # it comes again
            if not self._watch.stopped:
                log.warning(
                    "%s is not cleaned up yet: %s",
                    eviction.instance,
                    exc,
                    extra=fields("cleanup_delayed", instance=eviction.instance, error=exc),
                )
        if evicted and lost is not None:
            yield InstanceCleaned(eviction.instance, lost, tuple(evicted), self._dry_run)

    def _evict(
        self,
        status: InstanceStatus,
        items: Mapping[str, KeyValue],
        incarnations: Set[str],
        evicted: list[RankRecord],
        by: Eviction,
    ) -> bool:
        """Fills `evicted`.

        False: the instance has changed since it was read, so look at it again before any more is
        evicted.
        """
        meant = (
            [record for record in status.records if record.incarnation in incarnations]
            if status.missing
            else []
        )
        for start in range(0, len(meant), AT_ONCE):
            batch = meant[start : start + AT_ONCE]
            if not self._dry_run:
                failpoints.reach("cleanup.before_evict")
                if not evict_all(
                    self._etcd,
                    [items[record.key] for record in batch],
                    _still_missing(status, items),
                    by=by,
                ):
                    return False
            evicted += batch
        return True

    @property
    def away(self) -> EtcdUnavailable | None:
        """Why there is no news: etcd cannot be reached. None while it can."""
        return self._watch.away

    def stop(self) -> None:
        """Ends the iteration. May be called from any thread, and again; `close` ends the rest."""
        self._watch.stop()

    def close(self) -> None:
        """Ends the iteration and the election. May be called from any thread, and again."""
        self._mark_closed()
        self._watch.close()
        self._election.close()

    def __enter__(self) -> CleaningWatch:
        if not self._dry_run:  # a dry run must not keep other watches from acting
            self._election.start()
        self._watch.__enter__()
        return self


def _still_missing(status: InstanceStatus, items: Mapping[str, KeyValue]) -> Guard:
    """Holds as long as one of the missing ranks is: what a lost rank has left under its key counts
    as nothing.
    """
    keys = [record_key(status.instance, rank) for rank in status.missing]
    free = next((key for key in keys if key not in items), None)
    return absent(free) if free is not None else unchanged(items[keys[0]])
