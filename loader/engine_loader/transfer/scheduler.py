"""Carries out a plan: chunks in a bounded pipeline for each source, from several sources at once,
moved on where one fails.

One thread, the caller's, starts reads, asks whether they are done, and naps in between. Only what
may hang, the check that a source is still what it was, runs in separate threads. Nothing is in
flight any more when `Transfer.run` returns or raises.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from engine_loader import metrics
from engine_loader.engines.base import Engine, session_of
from engine_loader.errors import (
    Cancelled,
    LoaderError,
    ReadFailed,
    SourceEvicted,
    SourceLost,
    Stalled,
)
from engine_loader.planning.reads import Span
from engine_loader.transfer.chunks import Chunks
from engine_loader.transfer.clock import Clock, SystemClock, at_once
from engine_loader.transfer.leaving import DRAIN_S, Leaving
from engine_loader.transfer.pace import Pace
from engine_loader.transfer.pipe import SILENT_S, Pipe, Source, silences
from engine_loader.transfer.progress import OnProgress
from engine_loader.transfer.reads import Reads, Stage
from engine_loader.transfer.shares import loss_of
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


OnChecked = Callable[[int, Sequence[Span]], None]


class Transfer:
    """One use: `start`, if reads may begin early, and `run`, which is `step` and `nap` until all
    has come, and then `settle`.
    """

    def __init__(
        self,
        engine: Engine,
        spans: Iterable[Span],
        sources: Sequence[Source],
        pace: Pace,
        on_progress: OnProgress,
        cancel: threading.Event | None = None,
        stage: Stage | None = None,
        on_checked: OnChecked = lambda number, spans: None,
        on_idle: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
    ) -> None:
        """`stage` is needed for spans that are not read straight to their places.

        `on_checked` gets the number of a source, and spans that have come from it and hold the
        content that was resolved. `on_idle` is called again and again while nothing comes: what it
        does should take no longer than a nap.
        """
        self._clock = clock or SystemClock()
        self._engine = engine
        self._pace = pace
        self._on_progress = on_progress
        self._cancel = cancel or threading.Event()
        spans = list(spans)
        if stage is None and any(span.staged for span in spans):
            raise ValueError("there are spans to be staged, and no buffers for them")
        self._chunks = Chunks(spans, pace.chunk_nbytes)
        self._pipes = [
            Pipe(
                number,
                source,
                source.share(),
                pace.least if source.lends else pace.begin,  # a slow one would end last
                self._chunks.queues_of(number),
            )
            for number, source in enumerate(sources)
        ]
        self.shares = [pipe.share for pipe in self._pipes]
        self._active = list(self._pipes)
        self._reads = Reads(engine, pace, self._chunks, stage, self._active)
        self._leaving = Leaving(engine, self._clock, pace, self._reads.again)
        self._on_checked = on_checked
        self._on_idle = on_idle
        self._moved = 0  # sources that something has come of since the last nap
        self._nap_s = pace.nap_s[0]
        # in naps, so that a process that was stopped does not take that for its sources' silence
        self._idle_s = 0.0
        self._reported_at = self._clock.now()

    def start(self) -> None:
        """Starts the first reads from sources that are ready, before anything is checked."""
        now = self._clock.now()
        for pipe in self._active:
            if pipe.source.ready():
                self._reads.fill(pipe, now)

    def run(self) -> None:
        """Raises SourceLost, SourceEvicted, Stalled or TornRead where no source is left, and
        Cancelled.

        EngineFailed where reads can still write to the caller's memory, because the engine could
        not end them in time.
        """
        interrupted = True
        try:
            while not self.step():
                self.nap()
            interrupted = False
        except LoaderError:
            interrupted = False
            raise
        finally:
            self.settle(interrupted)

    def settle(self, interrupted: bool) -> None:
        """Before the caller has its memory back: waits a moment for what is in flight, and ends the
        rest, of every source.

        Whatever is raised meanwhile, another interrupt included, is raised when that is done.
        """
        self._leaving.settle(self._pipes, interrupted)

    def step(self) -> bool:
        """One look at every source; whether all has come."""
        if self._cancel.is_set():
            raise Cancelled("the load was cancelled")
        for pipe in list(self._active):
            self._drive(pipe, self._clock.now())
        self._leaving.see_off()
        if self._finished():
            return True
        if len(self._active) < len(self._pipes) and self._chunks.lost(self._active):
            raise loss_of(self.shares)
        return False

    def nap(self) -> None:
        """A short one where something may have come; longer ones while nothing happens."""
        least_s, most_s = self._pace.nap_s
        moved, self._moved = self._moved, 0
        self._nap_s = least_s if moved else min(2 * self._nap_s, most_s)
        self._idle_s = 0.0 if moved else self._idle_s + self._nap_s
        if self._clock.now() - self._reported_at >= SILENT_S:
            self._report()
        if moved < len(self._active):
            self._check_progress()
            self._on_idle()
            self._clock.sleep(self._nap_s, self._engine.wait)

    def _check_progress(self) -> None:
        """A transfer whose books do not balance would wait for ever: it raises instead."""
        in_pipes = sum(
            len(pipe.in_flight) + len(pipe.unchecked) + len(pipe.in_check) for pipe in self._pipes
        )
        self._chunks.check_balance(in_pipes)
        pace = self._pace
        if self._idle_s > 3 * max(pace.patience_s, pace.stall_s, pace.starve_s, DRAIN_S):
            raise LoaderError(
                f"nothing happens in a transfer that lacks {self._chunks.left} chunks, of which "
                f"{self._chunks.queued} are queued",
                "load again, and report this",
            )

    def _finished(self) -> bool:
        """All has come, from sources that were afterwards still what they had been."""
        nothing_is_left = self._chunks.all_checked and not self._leaving
        return nothing_is_left and any(pipe.open for pipe in self._active)

    def _drive(self, pipe: Pipe, now: float) -> None:
        """One look at one source."""
        error = pipe.source.lost()
        if error is not None:
            self._drop(pipe, error)
            return
        if pipe.check is None and (not pipe.open or self._check_is_due(pipe, now)):
            self._begin_check(pipe, now)
        if pipe.check is not None:
            self._look_at_check(pipe, now)
        if pipe not in self._active:  # its check has failed; what it has in flight is seen off
            return
        came = self._reads.collect(pipe, now)
        if came:
            self._moved += 1
            metrics.READ_NBYTES.inc(amount=came)
            self._report()
        if pipe.failure is not None and not pipe.in_flight:
            self._read_failed(pipe, pipe.failure)
        elif pipe.in_flight and now - pipe.moved_at > self._pace.stall_s:
            self._stalled(pipe, now)
        elif (pipe.open or pipe.may_begin) and pipe.failure is None:
            self._reads.fill(pipe, now)
            if pipe.source.stock is not None:
                self._see_to_its_stock(pipe, now)

    def _see_to_its_stock(self, pipe: Pipe, now: float) -> None:
        """One that is loading itself is left where others would be quicker: somewhere there is a
        complete one.
        """
        name = f"{pipe.source.name}, which is loading itself,"
        ours = self._chunks.came
        if (starved_s := pipe.starved_s(now)) > self._pace.starve_s:
            self._drop(pipe, Stalled(f"{name} has got nothing new for {starved_s:.1f} s"))
        elif pipe.open and pipe.is_slow(now, ours):
            self._drop(
                pipe,
                Stalled(
                    f"{name} has {pipe.amount:.0%} by now and brought us {ours:.0%}: the way "
                    "from there is slow"
                ),
            )

    def _check_is_due(self, pipe: Pipe, now: float) -> bool:
        waited = now - pipe.check_began
        if pipe.waits() and waited > pipe.poll_s:
            return True
        return bool(pipe.unchecked) and (
            waited > self._pace.check_s or not (pipe.in_flight or pipe.has_next())
        )

    # -- checks
    # ----------------------------------------------------------------------------------------------

    def _begin_check(self, pipe: Pipe, now: float) -> None:
        pipe.check_began = now
        pipe.in_check, pipe.unchecked = pipe.unchecked, []
        begin = at_once if pipe.source.ready() else self._clock.start
        pipe.check = begin(pipe.source.check, f"check of {pipe.source.name}")

    def _look_at_check(self, pipe: Pipe, now: float) -> None:
        if pipe.check is None or not pipe.check.done():
            if now - pipe.check_began > self._pace.stall_s:
                self._stalled(pipe, now)
            return
        error = pipe.check.exception()
        pipe.check = None
        self._idle_s = 0.0
        if error is None:
            pipe.open = True
            if pipe.in_check:
                self._on_checked(pipe.number, pipe.in_check)
            self._chunks.count_checked(pipe.in_check)
            pipe.in_check = []
            pipe.take_stock(now)
        elif isinstance(error, ReadFailed):
            self._read_failed(pipe, error)
        elif isinstance(error, LoaderError):
            self._drop(pipe, error)
        else:
            raise error

    def _report(self) -> None:
        now = self._reported_at = self._clock.now()
        self._on_progress(self._chunks.progress(silences(self._active, now)))

    # -- what goes wrong
    # ----------------------------------------------------------------------------------------------

    def _read_failed(self, pipe: Pipe, error: ReadFailed) -> None:
        """One read may fail for reasons of the way, so a source that nobody can stand in for is
        checked again.
        """
        pipe.failures += 1
        if self._chunks.can_spare(pipe, self._active) or pipe.failures > 1:
            self._drop(pipe, SourceLost(error.what, error.remedy))
        else:
            self._reopen(pipe)

    def _stalled(self, pipe: Pipe, now: float) -> None:
        self._leaving.end_reads(pipe)
        # what the engine cannot end goes on, and is looked at again after another `stall_s`
        pipe.moved_at = now
        if pipe.silent_since is None:
            pipe.silent_since = now - self._pace.stall_s
        silent_s = now - pipe.silent_since
        if self._chunks.can_spare(pipe, self._active) or silent_s > self._pace.patience_s:
            error = Stalled(
                f"nothing has come from {session_of(pipe.source.peer)} for {silent_s:.1f} s: "
                "its process is "
                "stopped, or the network between is cut"
            )
            self._drop(pipe, error)
        else:
            self._reopen(pipe)

    def _reopen(self, pipe: Pipe) -> None:
        pipe.open, pipe.failure, pipe.check = False, None, None
        pipe.unchecked += pipe.in_check
        pipe.in_check = []

    def _drop(self, pipe: Pipe, error: LoaderError) -> None:
        """Goes on without the source. What it brought and nobody has checked is read again, from
        others.

        Nothing that an evicted source brought counts, and what was checked is in the caller's
        books: so that ends the transfer.
        """
        self._active.remove(pipe)
        self._leaving.add(pipe)
        self._moved += 1
        pipe.share.error = error
        if isinstance(error, SourceEvicted) and pipe.share.nbytes:
            raise error
        again = pipe.unchecked + pipe.in_check
        pipe.unchecked, pipe.in_check = [], []
        self._reads.put_back(again)
        nbytes = sum(chunk.read_nbytes for chunk in again)
        pipe.share.nbytes -= nbytes
        self._chunks.left_nbytes += nbytes
        if self._active:
            log.warning(
                "%s is not read from any more: %s",
                pipe.source.name,
                error,
                extra=fields(
                    "source_dropped", key=pipe.source.name, reason=metrics.reason_of(error)
                ),
            )
            self._report()
