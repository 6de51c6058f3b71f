"""How a load goes into the sources of an attempt: with tickets for all of them in one transaction,
and one watch of their records. Used by `loading.attempt`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

from engine_loader.sources.selection import Choice
from engine_loader.sources.source import SourceRank
from engine_loader.transfer.progress import Progress
from engine_registry import Event, RankRecord, Registry
from engine_registry.errors import EtcdError, EtcdRefused
from engine_registry.holders.query import Holders
from engine_registry.pulls.taking import Taken
from engine_registry.schema.keyvalue import Snapshot
from engine_registry.telemetry.logs import fields
from engine_registry.watching.events import RankEvent
from engine_registry.watching.watch import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entered:
    """Which of the sources that were chosen can be read from now.

    Attributes:
        sources: Those whose records are what they were.
        taken: What was said of the tickets of all.
        holders: Those among whom the choice was made, as they are read from now. None where nobody
            was refused, or that is not known.
        watch: Of the records of the sources. None where nobody listens.
    """

    sources: list[SourceRank]
    taken: Sequence[Taken] = ()
    holders: Holders | None = None
    watch: Watch | None = None

    def is_taken(self, source: SourceRank) -> bool:
        """Whether it stands as it was, but another load has begun to read from it."""
        return any(source.record.incarnation in each.faster for each in self.taken)

    def report(self, progress: Progress) -> None:
        """Says in etcd, now and then, how far the load is. Never waits."""
        for each in self.taken:
            if each.ticket is not None:
                each.ticket.report(progress.nbytes, progress.total_nbytes)

    def give_back(self, undo: ExitStack) -> None:
        """The tickets, once all has been read: beside the caller, until `undo` is closed."""
        for each in self.taken:
            if each.ticket is not None:
                _beside(each.ticket.close, undo)

    def stop_listening(self, undo: ExitStack) -> None:
        """As `give_back`, once nobody wants news of the sources any more."""
        if self.watch is not None:
            _beside(self.watch.stop, undo)


def _beside(work: Callable[[], None], undo: ExitStack) -> None:
    """Takes etcd a moment, in which the caller goes on."""
    thread = threading.Thread(target=work, name="end of a load", daemon=True)
    thread.start()
    undo.callback(thread.join)


class Entrance:
    """Of one load, into the sources of one attempt after another."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._pulling = registry.pulling()

    def enter(self, choice: Choice, reader: RankRecord | None, undo: ExitStack) -> Entered:
        """Says in etcd that we are reading, so that a rank that wants to leave waits for us, and
        listens for news of the sources. `reader` is the rank that is filled, if it is registered.

        A source is not entered if its record is not any more what was resolved, or if the choice
        holds for places that are free and another load was faster.
        """
        taken = self._take([source.record for source in choice.sources], choice, reader)
        taken += self._take_again(choice, taken, reader)
        for each in taken:
            if each.ticket is not None:
                undo.enter_context(each.ticket)
        given = {record.incarnation for each in taken for record in each.records}
        entered = [source for source in choice.sources if source.record.incarnation in given]
        for source in entered:
            source.lend(undo)
        watch = None
        if entered:
            watch = self._listen(entered, taken[0].snapshot if len(taken) == 1 else None, undo)
        return Entered(entered, taken, _recounted(choice.holders, taken[-1]), watch)

    def _take_again(
        self, choice: Choice, taken: Sequence[Taken], reader: RankRecord | None
    ) -> list[Taken]:
        """For sources whose record has changed, but not in what we read: they have gone on to
        another version, and have retained this one.
        """
        given = {record.incarnation for each in taken for record in each.records}
        given.update(*(each.faster for each in taken))
        again = []
        for source in choice.sources:
            if source.record.incarnation in given:
                continue
            with suppress(EtcdError):  # then the attempt says why it cannot be read from
                now = self._registry.current(source.record)
                if now is not None and source.follow(now):
                    again.append(source.record)
        return self._take(again, choice, reader) if again else []

    def _take(
        self, records: Sequence[RankRecord], choice: Choice, reader: RankRecord | None
    ) -> list[Taken]:
        """Where etcd refuses one of the tickets, each is asked for by itself."""
        found = choice.holders
        among = [*found.ready, *found.loading] if found is not None else []
        try:
            return [self._pulling.take(records, reader, choice.free_since, among)]
        except EtcdError as exc:
            if isinstance(exc, EtcdRefused) and len(records) > 1:
                return [one for each in records for one in self._take([each], choice, reader)]
            for record in records:
                log.warning(
                    "reading from %s without a ticket, so it may leave meanwhile: %s",
                    record.key,
                    exc,
                    extra=fields("no_ticket", key=record.key, error=exc),
                )
            return [Taken(None, tuple(records))]

    def _listen(
        self, sources: Sequence[SourceRank], start: Snapshot | None, undo: ExitStack
    ) -> Watch:
        by_key = {source.record.key: source for source in sources}

        def tell(event: Event) -> None:
            if isinstance(event, RankEvent) and event.record.key in by_key:
                by_key[event.record.key].notice(event)

        watch = self._registry.watch_ranks([source.record for source in sources], start)
        undo.callback(watch.stop)
        return watch.call(tell)

    def close(self) -> None:
        """Any number of times. Tickets are their attempt's to give back."""
        self._pulling.close()


def _recounted(holders: Holders | None, taken: Taken) -> Holders | None:
    if holders is None or taken.readers is None:
        return None
    return replace(holders, readers=taken.readers, revision=taken.revision)
