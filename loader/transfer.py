"""Carries out a plan: chunks in a bounded pipeline for each source, from several sources at once, moved on where one fails.

One thread, the caller's, starts reads, asks whether they are done, and naps in between. Only what may hang, the check that a
source is still what it was, runs in threads of its own. Nothing is in flight any more when `Transfer.run` returns or raises.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from loader import metrics
from loader.boxes import Lines
from loader.engine import Engine, session_of
from loader.errors import Cancelled, LoaderError, ReadFailed, SourceLost, Stalled, TornRead
from loader.pace import Pace
from loader.pipe import Flight, Pipe, Share, Source
from loader.plan import ReadOp
from loader.reads import Span
from registry.logs import fields

log = logging.getLogger(__name__)
_SMALL_NBYTES = 64 << 10  # reads so small that the time is in their number: more of them may be in flight
_SMALL_DEPTH = 64
_SETTLE_S = 0.25  # how long reads that nobody wants any more may take before their peer is dropped, which takes a second


@dataclass(frozen=True)
class Progress:
    """How far a load is, in bytes that are read. Goes back where a source is lost before what it brought could be checked."""

    nbytes: int
    total_nbytes: int


OnProgress = Callable[[Progress], None]


class Stage(Protocol):
    """Buffers for what cannot be read straight to its place."""

    def take(self) -> int | None:
        """The address of one that is free, if any is."""

    def give_back(self, addr: int) -> None: ...

    def copy(self, addr: int, lines: Sequence[Lines]) -> None:
        """From the buffer to where the lines say."""


class Transfer:
    """One use: `run`."""

    def __init__(
        self,
        engine: Engine,
        spans: Iterable[Span],
        sources: Sequence[Source],
        pace: Pace,
        on_progress: OnProgress,
        cancel: threading.Event | None = None,
        stage: Stage | None = None,
        on_checked: Callable[[Sequence[Span]], None] = lambda _: None,
    ) -> None:
        """`stage` is needed for spans that are not read straight to their places. `on_checked` is told what has come and is known
        to be of the version that was resolved."""
        self._engine = engine
        self._pace = pace
        self._on_progress = on_progress
        self._cancel = cancel or threading.Event()
        self._stage = stage
        self._queues: dict[tuple[int, ...], deque[Span]] = {}  # by the numbers of the sources that hold what is in it
        for span in spans:
            if span.lines and stage is None:
                raise ValueError("there are spans to be staged, and no buffers for them")
            for chunk in span.cut(pace.chunk_nbytes):
                self._queue_of(chunk).append(chunk)
        self._left = {holders: len(queue) for holders, queue in self._queues.items()}  # chunks that are not checked yet
        self._total_nbytes = self._left_nbytes = sum(chunk.nbytes for queue in self._queues.values() for chunk in queue)
        self._pipes = [self._pipe(number, source) for number, source in enumerate(sources)]
        self.shares = [pipe.share for pipe in self._pipes]
        self._active = list(self._pipes)
        self._leaving: list[Pipe] = []  # dropped, with something in flight
        self._on_checked = on_checked

    def _pipe(self, number: int, source: Source) -> Pipe:
        holding = sorted((holders for holders in self._queues if number in holders), key=len)
        return Pipe(number, source, Share(source.name), self._pace.begin, [self._queues[holders] for holders in holding])

    def _queue_of(self, chunk: Span) -> deque[Span]:
        return self._queues.setdefault(_holders(chunk), deque())

    def run(self) -> None:
        """Raises SourceLost, Stalled or TornRead where no source is left, and Cancelled."""
        in_order = False
        try:
            self._read_all()
            in_order = True
        except LoaderError:
            in_order = True
            raise
        finally:
            self._settle()
            if not in_order:  # an interrupt may have kept from us that a read has begun
                for pipe in self._pipes:
                    self._engine.abandon(pipe.source.peer)

    def _read_all(self) -> None:
        least_s, most_s = self._pace.nap_s
        nap_s = least_s
        while True:
            if self._cancel.is_set():
                raise Cancelled("the load was cancelled")
            moved = [self._drive(pipe, time.monotonic()) for pipe in list(self._active)]
            self._see_off()
            if self._finished():
                return
            if len(self._active) < len(self._pipes) and self._something_is_lost():
                raise self._why()
            nap_s = least_s if any(moved) else min(2 * nap_s, most_s)
            if not all(moved):
                time.sleep(nap_s)

    def _finished(self) -> bool:
        """All has come, from sources that were afterwards still what they had been."""
        return not (any(self._left.values()) or self._leaving) and any(pipe.open for pipe in self._active)

    def _something_is_lost(self) -> bool:
        """Nobody is left to bring it."""
        active = {pipe.number for pipe in self._active}
        return not active or any(left and active.isdisjoint(holders) for holders, left in self._left.items())

    def _drive(self, pipe: Pipe, now: float) -> bool:
        """One look at one source; whether anything has come of it."""
        error = pipe.source.lost()
        if error is not None:
            self._drop(pipe, error)
            return True
        if pipe.check is not None:
            self._look_at_check(pipe, now)
        elif not pipe.open or self._check_is_due(pipe, now):
            self._begin_check(pipe, now)
        came = self._collect(pipe, now)
        if pipe.failure is not None and not pipe.in_flight:
            self._read_failed(pipe, pipe.failure)
        elif pipe.in_flight and now - pipe.moved_at > self._pace.stall_s:
            self._stalled(pipe, now)
        elif pipe.open and pipe.failure is None and pipe in self._active:
            self._fill(pipe, now)
            if pipe.source.stock is not None:
                self._see_to_its_stock(pipe, now)
        return came

    def _see_to_its_stock(self, pipe: Pipe, now: float) -> None:
        """One that is loading itself is left where others would be quicker: somewhere there is a complete one."""
        who = f"{pipe.source.name}, which is loading itself,"
        ours = 1 - self._left_nbytes / max(self._total_nbytes, 1)
        if (starved_s := pipe.starved_s(now)) > self._pace.starve_s:
            self._drop(pipe, Stalled(f"{who} has got nothing new for {starved_s:.1f} s"))
        elif pipe.open and pipe.is_slow(now, ours):
            self._drop(pipe, Stalled(f"{who} has {pipe.amount:.0%} by now and brought us {ours:.0%}: the way from there is slow"))

    def _check_is_due(self, pipe: Pipe, now: float) -> bool:
        waited = now - pipe.check_began
        if pipe.waits() and waited > pipe.poll_s:
            return True
        return bool(pipe.unchecked) and (waited > self._pace.check_s or not (pipe.in_flight or pipe.has_next()))

    # -- checks --------------------------------------------------------------------------------------------------------------

    def _begin_check(self, pipe: Pipe, now: float) -> None:
        pipe.check_began = now
        pipe.in_check, pipe.unchecked = pipe.unchecked, []
        pipe.check = _in_background(pipe.source.check, f"check of {pipe.source.name}")

    def _look_at_check(self, pipe: Pipe, now: float) -> None:
        if pipe.check is None or not pipe.check.done():
            if now - pipe.check_began > self._pace.stall_s:
                self._stalled(pipe, now)
            return
        error = pipe.check.exception()
        pipe.check = None
        if error is None:
            pipe.open = True
            self._on_checked(pipe.in_check)
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

    # -- reads ---------------------------------------------------------------------------------------------------------------

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
                read = ReadOp(pipe.source.name, pipe.src_addr(chunk), chunk.dst_addr if staged is None else staged, chunk.nbytes)
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

    def _collect(self, pipe: Pipe, now: float) -> bool:
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
            pipe.window = max(self._pace.least, pipe.window // 2) if slow else min(pipe.window + 1, self._pace.depth)
            came += chunk.nbytes
        if came:
            metrics.READ_NBYTES.inc(amount=came)
            self._tell()
        return came > 0

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

    # -- what goes wrong -----------------------------------------------------------------------------------------------------

    def _read_failed(self, pipe: Pipe, error: ReadFailed) -> None:
        """One read may fail for reasons of the way, so a source that nobody can stand in for is asked again who it is."""
        pipe.failures += 1
        if self._can_be_replaced(pipe) or pipe.failures > 1:
            self._drop(pipe, SourceLost(str(error)))
        else:
            self._reopen(pipe)

    def _stalled(self, pipe: Pipe, now: float) -> None:
        self._end_reads(pipe)
        if pipe.silent_since is None:
            pipe.silent_since = now - self._pace.stall_s
        silent_s = now - pipe.silent_since
        if self._can_be_replaced(pipe) or silent_s > self._pace.patience_s:
            error = Stalled(
                f"nothing has come from {session_of(pipe.source.peer)} for {silent_s:.1f} s: its process is "
                "stopped, or the network between is cut"
            )
            self._drop(pipe, error)
        else:
            self._reopen(pipe)

    def _can_be_replaced(self, pipe: Pipe) -> bool:
        """Others are left for all that it may have to bring; behind one that is loading itself there is one that is complete."""
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
        """Goes on without the source. What it brought and nobody has checked is read again, from others."""
        if pipe not in self._active:
            return
        self._active.remove(pipe)
        self._leaving.append(pipe)
        pipe.leave_by = time.monotonic() + _SETTLE_S
        pipe.share.error = error
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
                extra=fields("source_dropped", key=pipe.source.name, reason=metrics.reason_of(error)),
            )
            self._tell()

    # -- nothing stays in flight -----------------------------------------------------------------------------------------------

    def _see_off(self) -> None:
        """What a dropped source still has in flight ends by itself as a rule; what does not is ended. Then others may read it."""
        for pipe in list(self._leaving):
            for number in list(pipe.in_flight):
                if self._is_over(number):
                    self._again(pipe, number)
            hangs = pipe.check is not None and not pipe.check.done()
            if not (pipe.in_flight or hangs):
                self._leaving.remove(pipe)
            elif time.monotonic() > pipe.leave_by:
                self._end_reads(pipe)
                self._leaving.remove(pipe)

    def _is_over(self, number: int) -> bool:
        try:
            return self._engine.done(number)
        except (ReadFailed, KeyError):  # an interrupt may have kept from us that it was over before
            return True

    def _end_reads(self, pipe: Pipe) -> None:
        self._engine.abandon(pipe.source.peer)
        metrics.ABANDONED_READS.inc(amount=len(pipe.in_flight))
        for number in list(pipe.in_flight):
            self._is_over(number)  # it is: this is how the engine may forget the number
            self._again(pipe, number)

    def _settle(self) -> None:
        """Before the caller has its memory back: waits a moment for what is in flight, and ends the rest."""
        self._leaving = [pipe for pipe in self._pipes if pipe.in_flight or pipe.check is not None]
        for pipe in self._leaving:
            pipe.leave_by = time.monotonic() + _SETTLE_S
        while self._leaving:
            self._see_off()
            time.sleep(self._pace.nap_s[1])

    def _why(self) -> LoaderError:
        errors = [share.error for share in self.shares if share.error is not None]
        if len(errors) == 1:
            return errors[0]
        kind = next((kind for kind in (TornRead, Stalled) if any(isinstance(error, kind) for error in errors)), SourceLost)
        return kind("; ".join(f"{share.name}: {share.error}" for share in self.shares if share.error is not None))


def _holders(chunk: Span) -> tuple[int, ...]:
    return tuple([number for number, _ in chunk.srcs])


def _in_background(work: Callable[[], None], name: str) -> Future[None]:
    """In a daemon thread: one that hangs must not keep the process from ending, as those of an executor do."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as exc:  # noqa: BLE001  handed on to who asks the future
            future.set_exception(exc)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
