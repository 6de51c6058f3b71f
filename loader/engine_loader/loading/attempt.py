"""One attempt of a load: enter the sources, plan, transfer the missing bytes, verify them. Made by
`load`, in whose thread it runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from engine_loader.engines.base import lend
from engine_loader.errors import (
    Cancelled,
    DigestsMissing,
    SourceEvicted,
    SourceLost,
    TornRead,
)
from engine_loader.loading.evicted import check_registered, discard_evicted
from engine_loader.loading.job import Job
from engine_loader.loading.lost import LostSources
from engine_loader.loading.report import Filled, with_what_came
from engine_loader.loading.reuse import Reuse
from engine_loader.planning.plan import Planner
from engine_loader.planning.reads import Span, payload_of
from engine_loader.publishing.replica import Republication
from engine_loader.sources.digest_check import DigestCheck
from engine_loader.sources.entrance import Entered, Entrance
from engine_loader.sources.selection import Choice
from engine_loader.sources.source import SourceRank
from engine_loader.tensors.cuda import to_register
from engine_loader.transfer.pace import Pace
from engine_loader.transfer.progress import Progress
from engine_loader.transfer.received import Received
from engine_loader.transfer.scheduler import Transfer
from engine_loader.transfer.staging import Staging
from engine_registry import RankRecord, RankState
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
            place = self._enter(undo)
            entered = place.sources
            plan = self.planner.plan([source.origin for source in entered])
            check = self._digest_check(entered, undo)
            compare_s = 0.0
            if self.job.reuse and not self.received.compared:
                start = time.monotonic()
                self._hold(place, plan, undo)
                compare_s = time.monotonic() - start
            spans: Sequence[Span] = plan
            if (held := self.received.held) is not None:
                spans = held.missing(plan)
                if check is not None:
                    check.spare(held.complete())
            transfer = self._transfer(place, spans, check, undo)
            start = time.monotonic()
            self._bring(transfer, entered)
            transfer_s = time.monotonic() - start
            self._verify(check)
            digest_s = time.monotonic() - start - transfer_s
        most = max(range(len(entered)), key=lambda number: transfer.shares[number].nbytes)
        read = [
            source for source, share in zip(entered, transfer.shares, strict=True) if share.nbytes
        ]
        return Filled(
            entered[most].record,
            spans,
            payload_of(plan) - payload_of(spans) if held is not None else 0,
            transfer.shares,
            transfer_s,
            compare_s + digest_s,
            verified=check is not None,
            outlived=[source.record.key for source in read if source.outlived],
            within_host=[source.record.key for source in read if source.within_host],
            contents=list(dict.fromkeys(source.record.content for source in entered)),
        )

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

    def _hold(self, place: Entered, plan: Sequence[Span], undo: ExitStack) -> None:
        """What the tensors hold already has not to come."""
        reuse = Reuse(self.job, self.choice, place.sources, self.received)
        reuse.hold(plan, lambda progress: self._report(progress, 0, place), undo)
        if self.republication is not None:
            self.republication.mark(self.received.arrivals)

    def _transfer(
        self,
        place: Entered,
        spans: Sequence[Span],
        check: DigestCheck | None,
        undo: ExitStack,
    ) -> Transfer:
        """Of the spans that have not come before, and of the digests."""
        entered = place.sources
        missing = self.received.arrivals.missing(spans)
        ahead_nbytes = sum(span.read_nbytes for span in spans) - sum(
            span.read_nbytes for span in missing
        )
        return Transfer(
            self.job.engine,
            [*missing, *(check.spans if check is not None else ())],
            [source.for_transfer() for source in entered],
            self._pace(check),
            lambda progress: self._report(progress, ahead_nbytes, place),
            self.job.cancel,
            self._staging(missing, undo),
            lambda number, checked: self._receive(entered[number].record, checked, check),
        )

    def _pace(self, check: DigestCheck | None) -> Pace:
        """The sooner bytes are checked, the sooner they can be summed up."""
        pace = self.job.pace
        if check is None or check.tallied:
            return pace
        return replace(pace, check_s=min(pace.check_s, _SUMMED_UP_S))

    def _staging(self, spans: Sequence[Span], undo: ExitStack) -> Staging | None:
        """Buffers, if any of the reads needs one."""
        staged = [span.nbytes for span in spans if span.staged]
        if not staged:
            return None
        nbytes = max(staged)
        count = min(len(staged), max(2, _STAGING_NBYTES // nbytes))
        device = self.job.device
        staging = Staging(self.job.destination.parts.values(), device, count, nbytes)
        lend(self.job.engine, undo, to_register(staging.region, device.type), owner=staging)
        return staging

    def _receive(
        self, record: RankRecord, checked: Sequence[Span], check: DigestCheck | None
    ) -> None:
        """Spans have come that the source's header has proven."""
        spans = [span for span in checked if check is None or not check.wants(span)]
        self.received.add(record, spans)
        if check is not None:
            check.receive(spans)
        if self.republication is not None:
            self.republication.mark(self.received.arrivals)

    def _report(self, progress: Progress, ahead_nbytes: int, place: Entered) -> None:
        of_all = replace(
            progress,
            nbytes=ahead_nbytes + progress.nbytes,
            total_nbytes=ahead_nbytes + progress.total_nbytes,
        )
        place.report(of_all)
        self.job.on_progress(of_all)

    def _bring(self, transfer: Transfer, entered: Sequence[SourceRank]) -> None:
        """All bytes, from ranks that nobody has evicted. What has come counts in any case, and is
        said in the error.
        """
        try:
            self._bring_or_lose(transfer, entered)
        except (SourceLost, TornRead, Cancelled) as exc:
            self.received.shares += transfer.shares
            if discard_evicted(self.received, entered, transfer.shares):
                self._withdraw()
            raise with_what_came(exc, entered, self.received) from exc

    def _bring_or_lose(self, transfer: Transfer, entered: Sequence[SourceRank]) -> None:
        """Remembers which sources were lost."""
        try:
            transfer.run()
            check_registered(self.job.registry, self.received, entered, transfer.shares)
        except SourceEvicted:
            self.lost.add(
                source.record
                for source, share in zip(entered, transfer.shares, strict=True)
                if share.error is not None
            )
            raise
        except SourceLost:
            self.lost.add(source.record for source in entered)
            raise
        finally:
            self.lost.add_reasons(transfer.shares)

    def _withdraw(self) -> None:
        """Our own readers must know that some of what they have read does not count."""
        if self.republication is not None:
            self.republication.close(SOURCE_EVICTED)

    # -- checks

    def _digest_check(self, entered: Sequence[SourceRank], undo: ExitStack) -> DigestCheck | None:
        verify, engine = self.job.verify, self.job.engine
        if verify == "header" or (verify == "auto" and not engine.tallies):
            return None
        parts = self.job.destination.parts
        try:
            if verify == "auto" and {source.algorithm for source in entered} != {engine.tallies}:
                return None
            check = DigestCheck(entered, self.received.dst, parts, self.job.device)
        except DigestsMissing:
            if verify == "auto":
                return None
            raise
        check.lend(engine, undo)
        return check

    def _verify(self, check: DigestCheck | None) -> None:
        if check is not None:
            check.compare(self.received.dst)
        self.job.destination.check_in_place(
            "tensors were given other memory while they were being filled", "load again"
        )
        self.lost.count_failovers()
