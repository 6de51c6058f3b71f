"""Carries out a plan: chunks in a bounded pipeline for each source, from several sources at once,
moved on where one fails.

One thread, the caller's, starts reads, asks whether they are done, and naps in between. Only what
may hang, the check that a source is still what it was, runs in threads of its own. Nothing is in
flight any more when `Transfer.run` returns or raises.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from engine_loader import metrics
from engine_loader.engines.base import Engine, session_of
from engine_loader.errors import (
    Cancelled,
    EngineFailed,
    LoaderError,
    ReadFailed,
    SourceEvicted,
    SourceLost,
    Stalled,
    TornRead,
)
from engine_loader.planning.boxes import Lines
from engine_loader.planning.plan import ReadOp
from engine_loader.planning.reads import Span
from engine_loader.transfer.clock import Clock, SystemClock
from engine_loader.transfer.pace import Pace
from engine_loader.transfer.pipe import Flight, Pipe, Share, Source
from engine_loader.transfer.progress import OnProgress, Progress
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_SMALL_NBYTES = (
    64 << 10
)  # reads so small that the time is in their number: more of them may be in flight
_SMALL_DEPTH = 64
# how long reads that nobody wants any more may take before their peer is dropped, which takes a
# second
_SETTLE_S = 0.25
_ASK_AGAIN_S = 0.05  # between two tries to end reads that the engine cannot end at once
_DRAIN_S = 60.0  # how long such reads may keep a load waiting for the memory that they write to
_HAND_BACK_S = 5.0  # and how long they may keep the caller waiting once the load is over


class Stage(Protocol):
    """Buffers for what cannot be read straight to its place."""

    def take(self) -> int | None:
        """The address of one that is free, if any is."""

    def give_back(self, addr: int) -> None: ...

    def copy(self, addr: int, lines: Sequence[Lines]) -> None:
        """From the buffer to where the lines say."""


class Transfer:
    """One use: `run`, which is `step` and `nap` until all has come, and then `settle`."""

    def __init__(
        self,
        engine: Engine,
        spans: Iterable[Span],
        sources: Sequence[Source],
        pace: Pace,
        on_progress: OnProgress,
        cancel: threading.Event | None = None,
        stage: Stage | None = None,
        on_checked: Callable[[int, Sequence[Span]], None] = lambda number, spans: None,
        clock: Clock | None = None,
    ) -> None:
        """`stage` is needed for spans that are not read straight to their places.

        `on_checked` gets the number of a source, and spans that have come from it and hold the
        content that was resolved.
        """
        self._engine = engine
        self._clock = clock or SystemClock()
        self._pace = pace
        self._on_progress = on_progress
        self._cancel = cancel or threading.Event()
        self._stage = stage
        self._queues: dict[
            tuple[int, ...], deque[Span]
        ] = {}  # by the numbers of the sources that hold what is in it
        for span in spans:
            if span.lines and stage is None:
                raise ValueError("there are spans to be staged, and no buffers for them")
            for chunk in span.cut(pace.chunk_nbytes):
                self._queue_of(chunk).append(chunk)
        self._left = {
            holders: len(queue) for holders, queue in self._queues.items()
        }  # chunks that are not checked yet
        self._total_nbytes = self._left_nbytes = sum(
            chunk.nbytes for queue in self._queues.values() for chunk in queue
        )
        self._pipes = [self._pipe(number, source) for number, source in enumerate(sources)]
        self.shares = [pipe.share for pipe in self._pipes]
        self._active = list(self._pipes)
        self._leaving: list[Pipe] = []  # dropped, with something in flight
        self._on_checked = on_checked
        self._moved = 0  # sources that something has come of since the last nap
        self._nap_s = pace.nap_s[0]
        # in naps, so that a process that was stopped does not take that for its sources' silence
        self._idle_s = 0.0

    def _pipe(self, number: int, source: Source) -> Pipe:
        holding = sorted((holders for holders in self._queues if number in holders), key=len)
        return Pipe(
            number,
            source,
            Share(source.name),
            self._pace.begin,
            [self._queues[holders] for holders in holding],
        )

    def _queue_of(self, chunk: Span) -> deque[Span]:
        return self._queues.setdefault(_holders(chunk), deque())

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

    def step(self) -> bool:
        """One look at every source; whether all has come."""
        if self._cancel.is_set():
            raise Cancelled("the load was cancelled")
        for pipe in list(self._active):
            self._drive(pipe, self._clock.now())
        self._see_off()
        if self._finished():
            return True
        if len(self._active) < len(self._pipes) and self._something_is_lost():
            raise self._why()
        return False

    def nap(self) -> None:
        """A short one where something may have come; longer ones while nothing happens."""
        least_s, most_s = self._pace.nap_s
        moved, self._moved = self._moved, 0
        self._nap_s = least_s if moved else min(2 * self._nap_s, most_s)
        self._idle_s = 0.0 if moved else self._idle_s + self._nap_s
        if moved < len(self._active):
            self._check_accounts()
            self._clock.sleep(self._nap_s)

    def _check_accounts(self) -> None:
        """A transfer whose books do not balance would wait for ever: it raises instead."""
        left = sum(self._left.values())
        queued = sum(len(queue) for queue in self._queues.values())
        found = queued + sum(
            len(pipe.in_flight) + len(pipe.unchecked) + len(pipe.in_check) for pipe in self._pipes
        )
        if left != found:
            raise LoaderError(
                f"a transfer expects {left} more chunks, and has a place for {found}",
                "load again, and report this",
            )
        if self._idle_s > 3 * max(
            self._pace.patience_s, self._pace.stall_s, self._pace.starve_s, _DRAIN_S
        ):
            raise LoaderError(
                f"nothing happens in a transfer that lacks {left} chunks, of which {queued} "
                "are queued",
                "load again, and report this",
            )

    def _finished(self) -> bool:
        """All has come, from sources that were afterwards still what they had been."""
        return not (any(self._left.values()) or self._leaving) and any(
            pipe.open for pipe in self._active
        )

    def _something_is_lost(self) -> bool:
        """Nobody is left to bring it."""
        active = {pipe.number for pipe in self._active}
        return not active or any(
            left and active.isdisjoint(holders) for holders, left in self._left.items()
        )

    def _drive(self, pipe: Pipe, now: float) -> None:
        """One look at one source."""
        error = pipe.source.lost()
        if error is not None:
            self._drop(pipe, error)
            return
        if pipe.check is not None:
            self._look_at_check(pipe, now)
        elif not pipe.open or self._check_is_due(pipe, now):
            self._begin_check(pipe, now)
        if (
            pipe not in self._active
        ):  # its check has failed: `_see_off` takes care of what it has in flight
            return
        self._collect(pipe, now)
        if pipe.failure is not None and not pipe.in_flight:
            self._read_failed(pipe, pipe.failure)
        elif pipe.in_flight and now - pipe.moved_at > self._pace.stall_s:
            self._stalled(pipe, now)
        elif pipe.open and pipe.failure is None:
            self._fill(pipe, now)
            if pipe.source.stock is not None:
                self._see_to_its_stock(pipe, now)

    def _see_to_its_stock(self, pipe: Pipe, now: float) -> None:
        """One that is loading itself is left where others would be quicker: somewhere there is a
        complete one.
        """
        who = f"{pipe.source.name}, which is loading itself,"
        ours = 1 - self._left_nbytes / max(self._total_nbytes, 1)
        if (starved_s := pipe.starved_s(now)) > self._pace.starve_s:
            self._drop(pipe, Stalled(f"{who} has got nothing new for {starved_s:.1f} s"))
        elif pipe.open and pipe.is_slow(now, ours):
            self._drop(
                pipe,
                Stalled(
                    f"{who} has {pipe.amount:.0%} by now and brought us {ours:.0%}: the way "
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
        pipe.check = self._clock.start(pipe.source.check, f"check of {pipe.source.name}")

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
            for chunk in pipe.in_check:
                self._left[_holders(chunk)] -= 1
            pipe.in_check = []
            pipe.take_stock(now)
        elif isinstance(error, ReadFailed):
            self._read_failed(pipe, error)
        elif isinstance(error, LoaderError):
            self._drop(pipe, error)
        else:
            raise error

    # -- reads
    # ----------------------------------------------------------------------------------------------

    def _fill(self, pipe: Pipe, now: float) -> None:
        for queue in pipe.queues:
            while queue:
                chunk = queue[0]
                if not pipe.has(chunk):
                    break
                limit = pipe.window if chunk.nbytes > _SMALL_NBYTES else _SMALL_DEPTH
                if len(pipe.in_flight) >= limit:
                    return
                staged = self._stage.take() if self._stage is not None and chunk.lines else None
                if chunk.lines and staged is None:
                    break  # until a buffer is free
                read = ReadOp(
                    pipe.source.name,
                    pipe.src_addr(chunk),
                    chunk.dst_addr if staged is None else staged,
                    chunk.nbytes,
                )
                try:
                    number = self._engine.start(pipe.source.peer, read)
                except ReadFailed as exc:
                    self._free(staged)
                    pipe.failure = exc
                    return
                queue.popleft()
                if not pipe.in_flight:
                    pipe.moved_at = now
                pipe.in_flight[number] = Flight(chunk, now, staged)

    def _free(self, staged: int | None) -> None:
        if staged is not None and self._stage is not None:
            self._stage.give_back(staged)

    def _collect(self, pipe: Pipe, now: float) -> None:
        came = 0
        for number, flight in list(pipe.in_flight.items()):
            try:
                if not self._engine.done(number):
                    continue
            except ReadFailed as exc:
                pipe.failure = exc
                self._again(pipe, number)
                continue
            del pipe.in_flight[number]
            chunk = flight.chunk
            if flight.staged is not None and self._stage is not None:
                self._stage.copy(flight.staged, chunk.lines)
                self._stage.give_back(flight.staged)
            pipe.unchecked.append(chunk)
            pipe.share.nbytes += chunk.nbytes
            self._left_nbytes -= chunk.nbytes
            pipe.moved_at, pipe.silent_since = now, None
            pipe.failures = 0
            slow = now - flight.since > self._pace.slow_s
            pipe.window = (
                max(self._pace.least, pipe.window // 2)
                if slow
                else min(pipe.window + 1, self._pace.depth)
            )
            came += chunk.nbytes
        if came:
            self._moved += 1
            metrics.READ_NBYTES.inc(amount=came)
            self._tell()

    def _again(self, pipe: Pipe, number: int) -> None:
        """What that read was to bring has to be read anew; the read is over."""
        flight = pipe.in_flight.pop(number)
        self._free(flight.staged)
        self._put_back([flight.chunk])

    def _put_back(self, chunks: Iterable[Span]) -> None:
        for chunk in chunks:
            self._queue_of(chunk).appendleft(chunk)
        for pipe in self._active:
            pipe.disordered = True

    def _tell(self) -> None:
        self._on_progress(Progress(self._total_nbytes - self._left_nbytes, self._total_nbytes))

    # -- what goes wrong
    # ----------------------------------------------------------------------------------------------

    def _read_failed(self, pipe: Pipe, error: ReadFailed) -> None:
        """One read may fail for reasons of the way, so a source that nobody can stand in for is
        asked again who it is.
        """
        pipe.failures += 1
        if self._can_be_replaced(pipe) or pipe.failures > 1:
            self._drop(pipe, SourceLost(error.what, error.remedy))
        else:
            self._reopen(pipe)

    def _stalled(self, pipe: Pipe, now: float) -> None:
        self._end_reads(pipe)
        # what the engine cannot end goes on, and is looked at again after another `stall_s`
        pipe.moved_at = now
        if pipe.silent_since is None:
            pipe.silent_since = now - self._pace.stall_s
        silent_s = now - pipe.silent_since
        if self._can_be_replaced(pipe) or silent_s > self._pace.patience_s:
            error = Stalled(
                f"nothing has come from {session_of(pipe.source.peer)} for {silent_s:.1f} s: "
                "its process is "
                "stopped, or the network between is cut"
            )
            self._drop(pipe, error)
        else:
            self._reopen(pipe)

    def _can_be_replaced(self, pipe: Pipe) -> bool:
        """Others are left for all that it may have to bring; behind one that is loading itself
        there is one that is complete.
        """
        if pipe.source.stock is not None:
            return True
        others = {other.number for other in self._active if other is not pipe}
        held = (holders for holders, left in self._left.items() if left and pipe.number in holders)
        return bool(others) and not any(others.isdisjoint(holders) for holders in held)

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
        self._leave(pipe)
        self._moved += 1
        pipe.share.error = error
        if isinstance(error, SourceEvicted) and pipe.share.nbytes:
            raise error
        again = pipe.unchecked + pipe.in_check
        pipe.unchecked, pipe.in_check = [], []
        self._put_back(again)
        nbytes = sum(chunk.nbytes for chunk in again)
        pipe.share.nbytes -= nbytes
        self._left_nbytes += nbytes
        if self._active:
            log.warning(
                "%s is not read from any more: %s",
                pipe.source.name,
                error,
                extra=fields(
                    "source_dropped", key=pipe.source.name, reason=metrics.reason_of(error)
                ),
            )
            self._tell()

    # -- nothing stays in flight
    # ----------------------------------------------------------------------------------------------

    def _leave(self, pipe: Pipe, settle_s: float = _SETTLE_S) -> None:
        """Its reads may end by themselves for so long."""
        self._leaving.append(pipe)
        pipe.leave_by = self._clock.now() + settle_s
        pipe.drained_by = pipe.leave_by + _DRAIN_S

    def _see_off(self) -> None:
        """What a dropped source has in flight ends by itself as a rule; what does not is ended.

        Then others may read it.
        """
        for pipe in list(self._leaving):
            if self._has_left(pipe):
                self._leaving.remove(pipe)
            elif self._clock.now() > pipe.drained_by:
                raise _not_ended([pipe])

    def _has_left(self, pipe: Pipe) -> bool:
        """Nothing of it writes to our memory any more."""
        for number in list(pipe.in_flight):
            if self._is_over(number):
                self._again(pipe, number)
        hangs = pipe.check is not None and not pipe.check.done()
        if not (pipe.in_flight or hangs or pipe.unsure):
            return True
        if self._clock.now() <= pipe.leave_by:
            return False
        pipe.leave_by = self._clock.now() + _ASK_AGAIN_S
        return self._end_reads(pipe)

    def _is_over(self, number: int) -> bool:
        try:
            return self._engine.done(number)
        except (ReadFailed, KeyError):  # an interrupt may have kept from us that it was over before
            return True

    def _end_reads(self, pipe: Pipe) -> bool:
        """Whether they have all ended.

        Those that the engine cannot end go on, and nobody else may write where they do.
        """
        self._engine.abandon(pipe.source.peer)
        if not self._engine.settled(pipe.source.peer):
            return False
        metrics.ABANDONED_READS.inc(amount=len(pipe.in_flight))
        for number in list(pipe.in_flight):
            self._is_over(number)  # it is: this is how the engine may forget the number
            self._again(pipe, number)
        pipe.unsure = False
        return True

    def settle(self, interrupted: bool) -> None:
        """Before the caller has its memory back: waits a moment for what is in flight, and ends the
        rest, of every source.

        Whatever is raised meanwhile, another interrupt included, is raised when that is done.
        """
        self._leaving = []
        for pipe in self._pipes:
            pipe.share.nbytes -= sum(
                chunk.nbytes for chunk in pipe.unchecked + pipe.in_check
            )  # nobody has checked it, nor will
            pipe.unchecked, pipe.in_check = [], []
            pipe.unsure = interrupted  # an interrupt may have kept from us that a read has begun
            if interrupted or pipe.in_flight or pipe.check is not None:
                self._leave(pipe, 0.0 if interrupted else _SETTLE_S)
        give_up = self._clock.now() + _SETTLE_S + _HAND_BACK_S
        raised: BaseException | None = None
        while self._leaving and self._clock.now() <= give_up:
            try:
                for pipe in list(self._leaving):
                    if self._has_left(pipe):
                        self._leaving.remove(pipe)
                if self._leaving:
                    self._clock.sleep(self._pace.nap_s[1])
            except BaseException as exc:  # noqa: BLE001  raised below
                if raised is None or not isinstance(exc, Exception):
                    raised = exc
        if self._leaving:
            raise _not_ended(self._leaving) from raised
        if raised is not None:
            raise raised

    def _why(self) -> LoaderError:
        errors = [share.error for share in self.shares if share.error is not None]
        if len(errors) == 1:
            return errors[0]
        kind = next(
            (
                kind
                for kind in (TornRead, Stalled)
                if any(isinstance(error, kind) for error in errors)
            ),
            SourceLost,
        )
        return kind(
            "; ".join(
                f"{share.name}: {share.error}" for share in self.shares if share.error is not None
            )
        )


def _holders(chunk: Span) -> tuple[int, ...]:
    return tuple([number for number, _ in chunk.srcs])


def _not_ended(pipes: Sequence[Pipe]) -> EngineFailed:
    return EngineFailed(
        f"reads from {' and '.join(session_of(pipe.source.peer) for pipe in pipes)} have not ended",
        "the memory that they write to must not be used again before this process ends",
        unsettled=[pipe.source.name for pipe in pipes],
    )
