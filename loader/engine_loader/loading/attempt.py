"""One attempt of a load: enter the sources, plan, transfer the missing bytes, verify them. Made by
`load`, in whose thread it runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from engine_loader.errors import (
    Cancelled,
    SourceEvicted,
    SourceLost,
    TornRead,
)
from engine_loader.loading.evicted import check_registered, discard_evicted
from engine_loader.loading.job import Job
from engine_loader.loading.lost import LostSources
from engine_loader.loading.others import Others
from engine_loader.loading.reading import Reading
from engine_loader.loading.report import Filled, with_what_came
from engine_loader.loading.reuse import Reuse
from engine_loader.planning.plan import Planner
from engine_loader.planning.reads import Span, payload_of
from engine_loader.publishing.replica import Republication
from engine_loader.sources.digest_check import DigestCheck
from engine_loader.sources.entrance import Entered, Entrance
from engine_loader.sources.selection import Choice
from engine_loader.sources.source import SourceRank
from engine_loader.transfer.received import Received
from engine_registry import RankState
from engine_registry.holders.query import Holders
from engine_registry.registration.writes import SOURCE_EVICTED

_SUMMED_UP_S = 0.05  # between two looks whether there is something to sum up
_STAGING_NBYTES = 48 << 20  # for what is not read straight to its place


class PlaceTaken(Exception):
    """Another load has begun to read from a source since it was chosen: choose again.

    `holders` are those among whom it was chosen, as they are read from now, if that is known.
    """

    def __init__(self, key: str, holders: Holders | None = None) -> None:
        super().__init__(key)
        self.holders = holders


class GoneOn(Exception):
    """The source has another version since it was chosen, and has not retained the one that was to
    be read: choose again. Nothing was read.
    """


@dataclass(frozen=True)
class Attempt:
    """What one attempt knows.

    `received` is what has come of the content before. It and `lost` are the load's, and grow while
    the attempt goes on.
    """

    job: Job
    choice: Choice
    entrance: Entrance
    planner: Planner
    received: Received
    lost: LostSources
    republication: Republication | None

    def fill(self) -> Filled:
        """Raises SourceLost or TornRead where another attempt may do better, and Cancelled; they
        say what has come. PlaceTaken where another load was faster to a source, and GoneOn where
        the source was faster. Else what `Transfer.run` and `DigestCheck` raise.
        """
        with ExitStack() as undo:
            early = self._begin_early(undo)
            place = self._enter(undo)
            if early is not None and place.sources != early.sources:
                early.close()
                early = None
            reading = early or self._reading(place.sources, undo)
            reading.place = place
            plan, check = reading.plan, reading.check
            compare_s = 0.0
            if self.job.reuse and not self.received.compared:
                start = time.monotonic()
                self._hold(reading, place, undo)
                compare_s = time.monotonic() - start
            spans: Sequence[Span] = plan
            if (held := self.received.held) is not None:
                spans = held.missing(plan)
                if check is not None:
                    check.spare(held.complete())
            if early is None:
                reading.begin(spans, self.entrance)
            self._bring(reading, place, undo)
            place.stop_listening(undo)
            start = time.monotonic()
            self._verify(check)
            digest_s = time.monotonic() - start
        shares = reading.shares
        entered = place.sources
        most = max(range(len(entered)), key=lambda number: shares[number].nbytes)
        read = [source for source, share in zip(reading.all, shares, strict=True) if share.nbytes]
        return Filled(
            entered[most].record,
            spans,
            payload_of(plan) - payload_of(spans) if held is not None else 0,
            shares,
            reading.seconds,
            compare_s + digest_s,
            verified=check is not None,
            outlived=[source.record.key for source in read if source.outlived],
            within_host=[source.record.key for source in read if source.within_host],
            contents=list(dict.fromkeys(source.record.content for source in entered)),
        )

    def _reading(self, sources: Sequence[SourceRank], undo: ExitStack) -> Reading:
        own = undo.enter_context(ExitStack())
        others = Others(self.job, self.choice, sources, self.received, self.lost)
        return Reading(
            self.job, sources, others, self.planner, self.received, self.republication, own
        )

    def _begin_early(self, undo: ExitStack) -> Reading | None:
        """Where memory of sources is mapped, reads begin before etcd has said that the sources may
        be entered. Their memory stays, whatever becomes of them, and nothing counts before etcd has
        said so and the header has proven it.
        """
        job = self.job
        plain = not job.reuse and job.also_from is None and self.republication is None
        if not (job.engine.outlives_sources and plain):
            return None
        for source in self.choice.sources:
            source.lend(undo)
        reading = self._reading(self.choice.sources, undo)
        reading.begin(reading.plan, self.entrance)
        reading.start()
        return reading

    # -- sources

    def _enter(self, undo: ExitStack) -> Entered:
        """Those that can be read from; TornRead, SourceLost, PlaceTaken or GoneOn if the others
        cannot be spared, and are not any more what they were resolved to be.
        """
        reader = self.republication.record if self.republication is not None else None
        entered = self.entrance.enter(self.choice, reader, undo)
        # Also where nothing is wanted: a transfer with no source would wait for one for ever.
        if len(entered.sources) < len(self.choice.sources) and (
            not entered.sources
            or self.planner.differences([source.origin for source in entered.sources])
        ):
            missed = next(each for each in self.choice.sources if each not in entered.sources)
            key = missed.record.key
            if entered.is_taken(missed):
                raise PlaceTaken(key, entered.holders)
            now = self.job.registry.current(missed.record)
            if now is None:
                self.lost.add([missed.record])
                raise SourceLost(f"{key} is not registered any more", "load again", key=key)
            if now.state is RankState.READY and now.version != missed.record.version:
                raise GoneOn(f"{key} has gone on to version {now.version} before it was read")
            raise TornRead(f"the record of {key} changed before it was read", "load again", key=key)
        return entered

    # -- reads

    def _hold(self, reading: Reading, place: Entered, undo: ExitStack) -> None:
        """What the tensors hold already has not to come."""
        reuse = Reuse(self.job, self.choice, place.sources, self.received)
        reuse.hold(reading.plan, lambda progress: reading.report(progress, 0), undo)
        if self.republication is not None:
            self.republication.mark(self.received.arrivals)

    def _bring(self, reading: Reading, place: Entered, undo: ExitStack) -> None:
        """All bytes, from ranks that nobody has evicted. What has come counts in any case, and is
        said in the error.
        """
        try:
            self._bring_or_lose(reading, place, undo)
            reading.others.check()
        except (SourceLost, TornRead, Cancelled) as exc:
            self.received.shares += reading.shares
            if discard_evicted(self.received, reading.all, reading.shares):
                self._withdraw()
            raise with_what_came(exc, reading.all, self.received) from exc

    def _bring_or_lose(self, reading: Reading, place: Entered, undo: ExitStack) -> None:
        """Remembers which sources were lost."""
        sources, shares = reading.all, reading.shares
        try:
            reading.run()
            place.give_back(undo)
            check_registered(self.job.registry, self.received, sources, shares)
        except SourceEvicted:
            self.lost.add(
                source.record
                for source, share in zip(sources, shares, strict=True)
                if share.error is not None
            )
            raise
        except SourceLost:
            self.lost.add(source.record for source in place.sources)
            raise
        finally:
            self.lost.add_reasons(shares)

    def _withdraw(self) -> None:
        """Our own readers must know that some of what they have read does not count."""
        if self.republication is not None:
            self.republication.close(SOURCE_EVICTED)

    # -- checks

    def _verify(self, check: DigestCheck | None) -> None:
        if check is not None:
            check.compare(self.received.dst)
        self.job.destination.check_in_place(
            "tensors were given other memory while they were being filled", "load again"
        )
        self.lost.count_failovers()
